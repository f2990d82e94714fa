"""Types of settings in a model's folder: a wrong one is refused with file, field and what is accepted."""

import json
from pathlib import Path

import pytest

from raybge.model.folder import read_json, read_settings
from raybge.model.setting_types import check_types
from raybge.util.errors import UserError

SENTENCE_BERT, TOKENIZER, ADAPTER = "sentence_bert_config.json", "tokenizer_config.json", "adapter_config.json"
OWN, POOLING = "config_sentence_transformers.json", "1_Pooling/config.json"


@pytest.mark.parametrize(
    ("file", "field", "value", "accepted"),
    [
        (SENTENCE_BERT, "max_seq_length", "512", "is the string '512': expected a whole number above 0"),
        (SENTENCE_BERT, "max_seq_length", True, "is true: expected a whole number above 0"),
        (SENTENCE_BERT, "max_seq_length", [512], r"is the list \[512\]: expected a whole number above 0"),
        (SENTENCE_BERT, "max_seq_length", -1, "is the number -1: expected a whole number above 0"),
        (SENTENCE_BERT, "do_lower_case", "false", "is the string 'false': expected true or false"),
        (SENTENCE_BERT, "do_lower_case", 1, "is the number 1: expected true or false"),
        (TOKENIZER, "model_max_length", "512", "expected a whole number above 0"),
        (TOKENIZER, "model_max_length", 2.5, "expected a whole number above 0"),
        (TOKENIZER, "do_lower_case", "true", "expected true or false"),
        (TOKENIZER, "unk_token", 3, "expected a string or an object"),
        (TOKENIZER, "padding_side", "both", "expected left or right"),
        (TOKENIZER, "model_input_names", "input_ids", "expected a list of strings"),
        (TOKENIZER, "added_tokens_decoder", [], "expected an object"),
        (ADAPTER, "r", "8", "expected an integer"),
        (ADAPTER, "r", True, "expected an integer"),
        (ADAPTER, "lora_alpha", "16", "expected a number"),
        (ADAPTER, "use_rslora", 0, "expected true or false"),
        (ADAPTER, "target_modules", {"query": 1}, "expected a string or a list of strings"),
        (ADAPTER, "base_model_name_or_path", ["m"], "expected a string"),
        (OWN, "prompts", ["query: "], "expected an object of strings"),
        (OWN, "prompts", {"query": 1}, "expected an object of strings"),
        (OWN, "default_prompt_name", 0, "expected a string"),
        (OWN, "default_prompt_name", {}, "expected a string"),
        (OWN, "similarity_fn_name", True, "expected a string"),
        (POOLING, "pooling_mode_mean_tokens", "true", "expected true or false"),
        (POOLING, "pooling_mode_cls_token", 1, "expected true or false"),
        (POOLING, "pooling_mode", True, "expected a string or a list of strings"),
        (POOLING, "include_prompt", "no", "expected true or false"),
        (POOLING, "word_embedding_dimension", "16", "expected an integer"),
        ("config.json", "hidden_size", "16", "expected an integer"),
        ("config.json", "hidden_size", True, "expected an integer"),
        ("config.json", "architectures", "BertModel", "expected a list of strings"),
        ("config.json", "model_type", 3, "expected a string"),
        ("config.json", "id2label", ["a"], "expected an object"),
        ("config.json", "auto_map", "code.Model", "expected an object"),
        ("config.json", "is_encoder_decoder", "no", "expected true or false"),
    ],
)
def test_a_setting_of_another_type_is_an_error(tmp_path, file, field, value, accepted):
    kinds = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    modules = [{"type": kind, "path": path} for kind, path in zip(kinds, ["", "1_Pooling"], strict=True)]
    (tmp_path / "1_Pooling").mkdir()
    files = {"config.json": {}, "modules.json": modules, POOLING: {"pooling_mode": "cls"}}
    for name, content in {**files, file: {field: value}}.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=accepted) as caught:
        read_settings(str(tmp_path))
        read_json(str(tmp_path), file)  # settings of the top folder do not need it
    assert str(caught.value).startswith(f"{tmp_path / file}: {field} is ")
    check_types(file, "pooling" if file == POOLING else Path(file).name, {field: None})  # unset


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a list of objects, found the object {}"),
        ([["Transformer"]], "expected a list of objects"),
        ([{"type": 3, "path": ""}], "type is the number 3: expected a string"),
        ([{"type": "sentence_transformers.models.Transformer", "path": 0}], "path is the number 0: expected a string"),
        ([{"type": "sentence_transformers.models.Transformer"}], "a list of modules with a type and a path"),
        ([{"path": "", "type": None}], "a list of modules with a type and a path"),
        (3, "expected a list of objects, found the number 3"),
    ],
)
def test_modules_of_another_type_are_an_error(tmp_path, content, message):
    (tmp_path / "modules.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        read_settings(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/modules.json: ")


def test_settings_of_published_models_are_accepted():
    check_types("f", TOKENIZER, {"model_max_length": 1e30, "unk_token": {"content": "<unk>"}, "padding_side": "left"})
    check_types("f", TOKENIZER, {"model_max_length": int(1e30), "strip_accents": None, "sep_token": "</s>"})
    check_types("f", SENTENCE_BERT, {"max_seq_length": 512, "do_lower_case": False})
    check_types("f", ADAPTER, {"r": 8, "lora_alpha": 16.0, "target_modules": "all-linear", "bias": "none"})
    check_types("f", OWN, {"prompts": {"query": "q: ", "document": None}, "default_prompt_name": None})
    check_types("f", "pooling", {"pooling_mode": ["mean", "cls"], "word_embedding_dimension": 8})


def test_missing_modules_and_switches_are_errors(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="modules.json is missing, which 1_Pooling/config.json belongs to"):
        read_settings(str(tmp_path))
    kinds = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    modules = [{"type": kind, "path": path} for kind, path in zip(kinds, ["", "1_Pooling"], strict=True)]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="expected a pooling of sentence-transformers, found none of its fields"):
        read_settings(str(tmp_path))
    (tmp_path / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 16}')
    assert read_settings(str(tmp_path)).pooling == "mean"  # the default of sentence-transformers
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": false}')
    with pytest.raises(UserError, match=r"pooling: expected one of cls, mean and lasttoken, found \[\]"):
        read_settings(str(tmp_path))
