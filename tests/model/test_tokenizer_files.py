"""A folder without its tokenizer: refused for every family, where transformers makes an empty one."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from damages import merges, vocabulary
from tiny import KINDS

from raybge import Encoder
from raybge.model.folder_checks import check_model_folder
from raybge.model.tokenizer_files import check_tokenizer_files
from raybge.util.errors import UserError

FLAG = "--model_name_or_path"
# families whose tokenizers are sentencepiece models
SENTENCEPIECE = ("xlm-roberta", "camembert", "albert", "t5", "gemma", "deberta-v2")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remaining", [(), ("tokenizer_config.json",)])
def test_missing_tokenizer_is_an_error(tiny, kind, remaining):
    folder = Path(tiny(kind))
    check_model_folder(str(folder), FLAG)
    for name in {"tokenizer.json", "tokenizer_config.json"} - {*remaining}:
        (folder / name).unlink()
    with pytest.raises(UserError, match=rf"^{FLAG} {folder}: no tokenizer here: expected tokenizer.json"):
        check_model_folder(str(folder), FLAG)
    with pytest.raises(UserError, match="no tokenizer here"):
        Encoder(str(folder), devices="cpu")


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "qwen3", *SENTENCEPIECE])
def test_file_of_another_family_is_an_error(tiny, tmp_path, kind):
    """transformers makes a tokenizer of special tokens only: it does not look for this file."""
    from raybge.model.folder import FolderSettings
    from raybge.model.loading import ModelLocation, load_tokenizer

    folder = tmp_path / kind
    transformers.AutoConfig.for_model(kind).save_pretrained(folder)
    (folder / "other.model").write_bytes(b"\x0a\x0e")
    check_tokenizer_files(folder)
    with pytest.raises(UserError, match=rf"the tokenizer of {folder} (has no words|does not load)"):
        load_tokenizer(ModelLocation(str(folder), FolderSettings()), None, True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer here: expected"),
        ({"vocab.json": "{}"}, "no tokenizer here, merges.txt is missing: expected"),
        ({"merges.txt": "a b"}, "no tokenizer here, vocab.json is missing: expected"),
        ({"vocab.txt": ""}, "vocab.txt is empty"),
        ({"vocab.txt": "a\n" * 90}, r"vocab.txt has 90 tokens, the model 100 \(vocab_size in config.json\)"),
        ({"spiece.model": ""}, "spiece.model is empty"),
        ({"tokenizer.json": "{"}, "tokenizer.json: not JSON"),
        ({"tokenizer.json": "[]"}, "tokenizer.json: added_tokens is missing"),
        ({"tokenizer.json": '{"added_tokens": []}'}, "tokenizer.json: normalizer is missing"),
        ({"vocab.json": '{"ab": 0, "bc": 1}', "merges.txt": "a b"}, "merges.txt lacks merges of the tokens of vocab"),
        ({"vocab.json": "[]", "merges.txt": "a b"}, "vocab.json: expected an object of tokens with their ids"),
    ],
)
def test_damaged_files_are_errors(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        check_tokenizer_files(tmp_path, 100)


@pytest.mark.parametrize(
    "files",
    [
        {"vocab.txt": "a\n" * 98},
        {"vocab.txt": "a\n" * 110},
        {"sentencepiece.bpe.model": "x"},
        {"qwen.tiktoken": "x"},
        {"tekken.json": "{}"},
        {"vocab.json": '{"a": 0, "ab": 1, "<s>": 2, "[PAD]": 3}', "merges.txt": "#version: 0.2\na b\n"},
        {"vocab.json": '{"ab</w>": 0}', "merges.txt": "a b</w> 9\n"},  # XLM
        {"tokenizer_config.json": '{"tokenizer_class": "CanineTokenizer"}'},  # characters, without a vocabulary
        {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["code.Own", null]}}'},
    ],
)
def test_other_formats_are_accepted(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    check_tokenizer_files(tmp_path, 100)


@pytest.mark.parametrize("make", [merges, vocabulary])
def test_folders_without_tokenizer_json_open(tmp_path, make):
    folder = make(tmp_path / "model")
    assert not (folder / "tokenizer.json").exists()
    assert Encoder(str(folder), devices="cpu").encode(["what is a lane"]).shape[0] == 1


def test_the_flags_tokenizer_replaces_the_folders(tiny, tmp_path):
    folder = Path(tiny())
    shutil.copytree(folder, tmp_path / "other")
    (folder / "tokenizer.json").unlink()
    check_model_folder(str(folder), FLAG, str(tmp_path / "other"))
    (tmp_path / "other" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"^--tokenizer_name {tmp_path / 'other'}: no tokenizer here"):
        check_model_folder(str(folder), FLAG, str(tmp_path / "other"))


@pytest.mark.parametrize("kind", ["roberta", "qwen3"])
def test_class_that_splits_otherwise_than_the_file_is_an_error(tiny, kind):
    folder = Path(tiny(kind))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["tokenizer_class"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{path}: tokenizer_class is missing"):
        Encoder(str(folder), devices="cpu")
