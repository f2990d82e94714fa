"""Settings of model folders, read without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_placeholders

from raybge.data.prompts import Instructions
from raybge.model.folder import FolderSettings, read_settings, remove_weights, write_settings
from raybge.model.folder_checks import check_model_folder
from raybge.util.errors import UserError

OLD = "sentence_transformers.models."


def folder_with(tmp_path: Path, files: dict[str, object]) -> str:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(tmp_path)


def modules(*kinds: str, first: str = "") -> list[dict[str, object]]:
    paths = [first, "1_Pooling", "2_Normalize", "3_More"]
    return [{"idx": i, "name": str(i), "path": paths[i], "type": kind} for i, kind in enumerate(kinds)]


def test_reading_settings_imports_no_torch(minilm):
    code = (
        "import sys; from raybge.model.folder import read_settings; "
        "from raybge.model.folder_checks import check_model_folder; "
        f"check_model_folder({minilm!r}, '--x'); print(read_settings({minilm!r})); "
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_old_sentence_transformers_folder(minilm):
    assert read_settings(minilm) == FolderSettings(
        pooling="mean", normalize=True, max_length=256, source="modules.json"
    )


@pytest.mark.parametrize("mode, pooling", [("cls", "cls"), ("mean", "mean"), ("lasttoken", "last_token")])
@pytest.mark.parametrize("normalize", [True, False])
def test_current_sentence_transformers_folder(tiny, tmp_path, mode, pooling, normalize):
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    parts = [Transformer(tiny(), max_seq_length=17), Pooling(16, pooling_mode=mode), Normalize()]
    prompts = {"query": "ask: ", "document": "say: ", "other": "o: "}
    model = st.SentenceTransformer(
        modules=parts if normalize else parts[:2], prompts=prompts, default_prompt_name="other"
    )
    model.save(str(tmp_path / "new"))
    types = [module["type"] for module in json.loads((tmp_path / "new" / "modules.json").read_text())]
    assert not any(kind.startswith(OLD) for kind in types), "not the new module paths: the test is of no use"
    assert read_settings(str(tmp_path / "new")) == FolderSettings(
        pooling, normalize, prompts, default_prompt_name="other", max_length=17, source="modules.json"
    )


def test_folder_without_settings_has_flag_embedding_defaults(tmp_path):
    folder = folder_with(tmp_path, {"config.json": {}, "tokenizer_config.json": {"model_max_length": int(1e30)}})
    assert read_settings(folder) == FolderSettings("cls", True, {}, None, None, "default")


@pytest.mark.parametrize(
    "config, pooling",
    [
        ({"model_type": "qwen3", "architectures": ["Qwen3Model"]}, "last_token"),
        ({"model_type": "new", "architectures": ["NewForCausalLM"]}, "last_token"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "last_token"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "cls"),
        ({"model_type": "modernbert", "architectures": None}, "cls"),
    ],
)
def test_decoder_without_settings_pools_its_last_token(tmp_path, config, pooling):
    folder = folder_with(tmp_path / "plain", {"config.json": config})
    assert read_settings(folder).pooling == pooling
    adapters = folder_with(tmp_path / "adapters", {"adapter_config.json": {"base_model_name_or_path": folder, "r": 8}})
    settings = read_settings(adapters)
    assert (settings.pooling, settings.base, settings.adapter["r"]) == (pooling, folder, 8)
    kinds = modules(OLD + "Transformer", OLD + "Pooling")
    files = {"modules.json": kinds, "1_Pooling/config.json": {"pooling_mode": "mean"}}
    assert read_settings(folder_with(tmp_path / "plain", files)).pooling == "mean"


def test_remove_weights_removes_nothing_else(tmp_path):
    old = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    old += ["pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors"]
    remaining = ["tokenizer.json", "model_notes.safetensors", "README.md", "train.bin"]
    folder_with(tmp_path, dict.fromkeys(old + remaining, ""))
    remove_weights(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(remaining)
    remove_weights(tmp_path / "nowhere")


def test_folder_with_weights_in_a_subfolder(tmp_path):
    files = {
        "modules.json": modules(OLD + "Transformer", OLD + "Pooling", first="0_Transformer"),
        "0_Transformer/sentence_bert_config.json": {"max_seq_length": 128, "do_lower_case": True},
        "0_Transformer/config.json": {},
        "1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    }
    folder = folder_with(tmp_path, files)
    write_placeholders(tmp_path / "0_Transformer")
    check_model_folder(folder, "--model_name_or_path")
    assert read_settings(folder) == FolderSettings(
        "cls", False, {}, None, 128, "modules.json", lower_case=True, subfolder="0_Transformer"
    )


@pytest.mark.parametrize(
    "kinds",
    [
        (OLD + "Transformer", OLD + "Pooling", OLD + "Dense"),
        (OLD + "Transformer",),
        ("custom_st.Transformer", OLD + "Pooling"),
        (OLD + "Transformer", OLD + "Normalize", OLD + "Pooling"),
    ],
)
def test_unsupported_modules_are_errors(tmp_path, kinds):
    folder = folder_with(tmp_path, {"modules.json": modules(*kinds), "1_Pooling/config.json": {}})
    with pytest.raises(UserError, match=r"modules\.json") as caught:
        read_settings(folder)
    assert all(kind in str(caught.value) for kind in kinds)


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode": "max"},
        {"pooling_mode": ["mean", "cls"]},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode_max_tokens": True},
        {"pooling_mode": "mean", "include_prompt": False},
    ],
)
def test_unsupported_poolings_are_errors(tmp_path, pooling):
    kinds = modules(OLD + "Transformer", OLD + "Pooling")
    folder = folder_with(tmp_path, {"modules.json": kinds, "1_Pooling/config.json": pooling})
    with pytest.raises(UserError, match=r"1_Pooling/config\.json"):
        read_settings(folder)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"modules.json": "{"}, "modules.json: not JSON"),
        ({"modules.json": [1]}, "modules.json: expected a list of objects"),
        ({"modules.json": modules(OLD + "Transformer", OLD + "Pooling")}, "1_Pooling/config.json is missing"),
        ({"sentence_bert_config.json": [1]}, r"sentence_bert_config.json: expected an object, found the list \[1\]"),
        ({"sentence_bert_config.json": {"transformer_task": "fill-mask"}}, "transformer_task is 'fill-mask'"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "x"}}, "default_prompt_name is 'x'"),
    ],
)
def test_damaged_folders_are_errors(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        read_settings(folder_with(tmp_path, files))


def test_folders_without_a_model_are_errors(tmp_path):
    flag = "--model_name_or_path"
    folder_with(tmp_path, {"empty/x": "", "bare/config.json": {}, "whole/config.json": {}})
    write_placeholders(tmp_path / "whole")
    for name, message in {
        "empty": "config.json is missing",
        "bare": "no weights here, expected one of model.safetensors",
        "bare/config.json": "expected a model's folder, found a file",
        "nowhere": "no such folder",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            check_model_folder(str(tmp_path / name), flag)
        assert str(caught.value).startswith(f"{flag} {tmp_path / name}: ")
    with pytest.raises(UserError, match="no such folder"):
        check_model_folder("./out/model", flag)
    check_model_folder(str(tmp_path / "whole"), flag)
    check_model_folder("BAAI/bge-small-en-v1.5", flag)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
@pytest.mark.parametrize("normalize", [True, False])
def test_settings_round_trip(tmp_path, pooling, normalize):
    written = FolderSettings(pooling, normalize, {"query": "ask: ", "document": ""}, None, 99, "modules.json")
    write_settings(tmp_path, written, 16, {"transformers": "5"})
    assert read_settings(str(tmp_path)) == written
    types = [module["type"] for module in json.loads((tmp_path / "modules.json").read_text())]
    assert types == [OLD + "Transformer", OLD + "Pooling", OLD + "Normalize"][: 2 + normalize]


def test_instructions():
    prompts = {"query": "ask: ", "document": "say: "}
    plain = Instructions(prompts=prompts)
    assert (plain.query_text("q"), plain.passage_text("p")) == ("ask: q", "say: p")
    own = Instructions("Find", r"Instruct: {}\nQuery: {}", "", prompts=prompts)
    assert own.query_text("{q}") == "Instruct: Find\nQuery: {q}"
    assert own.query_text("q", prompt="Sort") == "Instruct: Sort\nQuery: q"
    assert own.passage_text("p") == "p"
    assert own.prefixes() == {"query": "Instruct: Find\nQuery: ", "document": ""}
    assert plain.query_text("q", prompt="") == "q"


def test_instruction_after_the_text_cannot_be_saved():
    behind = Instructions("Find", "{1} ({0})")
    assert behind.query_text("q") == "q (Find)"
    with pytest.raises(UserError, match="query must end with the text"):
        behind.prefixes()


@pytest.mark.parametrize("bad", ["{}", "{query}{}", "{}{}{}", "{", "none"])
def test_format_without_two_places_is_an_error(bad):
    with pytest.raises(UserError, match="query_instruction_format"):
        Instructions("Find", bad)
    with pytest.raises(UserError, match="passage_instruction_format"):
        Instructions(passage_format=bad)
