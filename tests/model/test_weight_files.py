"""Files of weights: pointers of Git LFS and files that are cut off are found without loading them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raybge.model.folder_checks import check_model_folder
from raybge.model.weight_files import check_weight_files
from raybge.util.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 438\n"
WHOLE, PICKLE, INDEX = "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"


@pytest.fixture
def shards(tiny) -> Path:
    import transformers

    folder = Path(tiny())
    model = transformers.AutoModel.from_pretrained(folder)
    (folder / WHOLE).unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    check_weight_files(folder)
    return folder


@pytest.fixture
def pickle(tiny) -> Path:
    folder = Path(tiny())
    torch.save(load_file(folder / WHOLE), folder / PICKLE)
    (folder / WHOLE).unlink()
    check_weight_files(folder)
    return folder


@pytest.mark.parametrize("bytes_left", [0, 1, 9, 500, -1])
def test_cut_safetensors_are_errors(tiny, bytes_left):
    path = Path(tiny()) / WHOLE
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(UserError, match="is empty" if bytes_left == 0 else "is damaged or cut off") as caught:
        check_model_folder(str(path.parent), "--model_name_or_path")
    assert str(caught.value).startswith(f"--model_name_or_path {path.parent}: {path} is ")


@pytest.mark.parametrize("bytes_left", [0, 1, 9, 500, -1])
def test_cut_pickles_are_errors(pickle, bytes_left):
    (pickle / PICKLE).write_bytes((pickle / PICKLE).read_bytes()[:bytes_left])
    with pytest.raises(UserError, match=rf"{PICKLE} is (empty|damaged or cut off)"):
        check_weight_files(pickle)


@pytest.mark.parametrize(
    "name", [WHOLE, "config.json", "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"]
)
def test_pointers_of_git_lfs_are_errors(tiny, name):
    folder = Path(tiny())
    (folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS, .*: run `git lfs pull`"):
        check_model_folder(str(folder), "--model_name_or_path")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), f" is missing, which {INDEX} refers to"),
        (lambda path: path.write_text(POINTER), " is a pointer of Git LFS"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), " is damaged or cut off"),
        (lambda path: path.write_bytes(b""), " is empty"),
        (
            lambda path: path.write_bytes((path.parent / "other").read_bytes()),
            r": the tensor .* is missing, which model.safetensors.index.json refers to",
        ),
    ],
)
def test_damaged_shards_are_errors(shards, damage, message):
    first, second = sorted(shards.glob("model-*.safetensors"))[:2]
    (shards / "other").write_bytes(second.read_bytes())
    damage(first)
    with pytest.raises(UserError, match=first.name + message):
        check_weight_files(shards)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}', "{"]
)
def test_damaged_indices_are_errors(shards, content):
    (shards / INDEX).write_text(content)
    with pytest.raises(UserError, match=f"{INDEX}: expected a JSON object with a weight_map"):
        check_weight_files(shards)


def test_pickles_of_old_torch_are_accepted(pickle):
    torch.save(torch.load(pickle / PICKLE), pickle / PICKLE, _use_new_zipfile_serialization=False)
    check_weight_files(pickle)


def test_check_imports_no_torch(shards):
    code = (
        "import sys; from raybge.model.folder_checks import check_model_folder; "
        f"check_model_folder({str(shards)!r}, '--x'); assert not {{'torch', 'transformers', 'ray'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_shards_of_an_index_are_those_of_transformers(shards):
    index = json.loads((shards / INDEX).read_text())["weight_map"]
    assert set(index.values()) == {path.name for path in shards.glob("model-*.safetensors")}
