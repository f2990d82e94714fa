"""Flags of the model card, and what the base model's card adds."""

import pytest

from raybge.cli.options import PretrainOptions, TrainOptions
from raybge.cli.parser import build_options
from raybge.training.card_spec import CardSpec
from raybge.util.errors import UserError


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    card = "---\nlicense: mit\nlanguage: [en, xx-invalid!]\nbase_model: BAAI/bge-m3\n---\n"
    (tmp_path / "base" / "README.md").write_text(card)
    return str(tmp_path / "base")


def spec(options_class=TrainOptions, **flags):
    required = {"train_data": ["d.jsonl"], "output_dir": "o"}
    return CardSpec.from_options(build_options(options_class, {**required, **flags}))


def test_license_and_languages_are_those_of_the_base_model(base):
    card = spec(model_name_or_path=base)
    assert (card.license, card.languages, card.base.hub_name) == ("mit", ("en",), "BAAI/bge-m3")


def test_the_flags_override_the_base_model(base):
    card = spec(model_name_or_path=base, license="cc-by-nc-4.0", language=["de", "multilingual"])
    assert (card.license, card.languages) == ("cc-by-nc-4.0", ("de", "multilingual"))


def test_a_model_from_scratch_has_no_base():
    card = spec(PretrainOptions, config_name="c", tokenizer_name="t", license="mit")
    assert (card.base, card.license, card.languages) == (None, "mit", ())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"license": "Apache 2.0"}, "--license Apache 2.0: expected an identifier of the hub, such as apache-2.0"),
        ({"language": ["English"]}, "--language English: expected ISO 639 codes such as en"),
    ],
)
def test_wrong_values_are_refused(base, flags, message):
    with pytest.raises(UserError, match=message):
        spec(model_name_or_path=base, **flags)


def test_a_local_model_is_named_without_its_folder(base, tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = spec(model_name_or_path="runs/mine", tokenizer_name="BAAI/bge-m3", token="hf_x")
    assert card.flags["model_name_or_path"] == "mine" and card.flags["tokenizer_name"] == "BAAI/bge-m3"
    assert "token" not in card.flags


def test_hyperparameters_have_their_defaults(base):
    values = spec(model_name_or_path=base, temperature=0.05).hyperparameters
    assert (values["temperature"], values["train_group_size"], values["query_max_len"]) == (0.05, 8, 32)
    assert "lora_rank" not in values and "train_data" not in values and "learning_rate" not in values
    assert spec(model_name_or_path=base, use_lora=True).hyperparameters["lora_rank"] == 64


def test_machines_and_folders_are_not_published(base, tmp_path):
    card = spec(model_name_or_path=base, address="head.internal:6379", logging_dir=str(tmp_path), learning_rate=1e-4)
    assert "learning_rate" in card.flags and not {"address", "logging_dir"} & card.flags.keys()
