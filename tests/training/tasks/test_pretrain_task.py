"""Pre-training: wrong flags have their messages, and in a worker every field of the spec reaches its place."""

from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import WORDS, make_tiny

from raybge.cli.options import PretrainOptions
from raybge.cli.parser import build_options
from raybge.losses.retromae_loading import load_pretraining_model
from raybge.training.tasks.pretrain_spec import PretrainSpec
from raybge.training.tasks.pretrain_task import PretrainTask
from raybge.training.tasks.task import TaskComponents
from raybge.util.errors import UserError

ARGS = SimpleNamespace(device="cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", head=True, words=[*WORDS, "[MASK]"], mask=True)


def spec_of(model: str, **flags) -> PretrainSpec:
    given = {"model_name_or_path": model, "train_data": ["d"], "output_dir": "o", **flags}
    return PretrainSpec.from_options(build_options(PretrainOptions, {n: v for n, v in given.items() if v is not None}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model_name_or_path": None}, "missing: --model_name_or_path, or --config_name and --tokenizer_name"),
        ({"model_name_or_path": None, "config_name": "c"}, "missing: --model_name_or_path"),
        ({"model_name_or_path": None, "tokenizer_name": "t"}, "missing: --model_name_or_path"),
        ({"model_name_or_path": "./nowhere"}, "--model_name_or_path ./nowhere: no such folder"),
        ({"max_seq_length": 2}, "--max_seq_length must be at least 3, found 2"),
        ({"encoder_mlm_probability": 1.0}, "--encoder_mlm_probability must be above 0 and below 1, found 1.0"),
        ({"decoder_mlm_probability": 0.0}, "--decoder_mlm_probability must be above 0 and below 1, found 0.0"),
        ({"eval_strategy": "steps"}, "--eval_strategy is not supported by raybge.pretrain"),
        ({"do_eval": True}, "--do_eval is not supported by raybge.pretrain"),
        ({"eval_on_start": True}, "--eval_on_start is not supported by raybge.pretrain"),
        ({"bow_loss_weight": 0.0}, "--bow_loss_weight must be above 0, found 0.0"),
    ],
)
def test_wrong_flags_are_named(model, flags, message):
    with pytest.raises(UserError, match=message):
        spec_of(model, **flags)


def test_flags_are_checked_in_the_order_of_their_messages(model):
    """The first mistake is the one that is named."""
    wrong = {"max_seq_length": 2, "encoder_mlm_probability": 1.0, "do_eval": True, "bow_loss_weight": 0.0}
    for name, valid in {
        "max_seq_length": 3,
        "encoder_mlm_probability": 0.3,
        "do_eval": False,
        "bow_loss_weight": 0.1,
    }.items():
        with pytest.raises(UserError, match=f"--{name}"):
            spec_of(model, **wrong)
        wrong[name] = valid
    spec_of(model, **wrong)


# The value of a field in what `build` returns.
PLACES: dict[str, Callable[[TaskComponents], Any]] = {
    "max_seq_length": lambda c: c.tokenizer.max_seq_length,
    "seed": lambda c: c.tokenizer.seed,
    "encoder_mlm_probability": lambda c: c.tokenizer.encoder_mlm_probability,
    "decoder_mlm_probability": lambda c: c.tokenizer.decoder_mlm_probability,
}
VALUES = {"max_seq_length": 7, "seed": 7, "encoder_mlm_probability": 0.125, "decoder_mlm_probability": 0.25}


def test_every_field_has_a_test():
    assert {field.name for field in fields(PretrainSpec)} == PLACES.keys() | {
        "base_model",
        "model",
        "allow_unknown_tokens",
    }


@pytest.mark.parametrize("name", PLACES)
def test_a_field_reaches_its_place(model, name):
    spec = spec_of(model)
    plain, changed = (PretrainTask(each).build(ARGS) for each in (spec, replace(spec, **{name: VALUES[name]})))
    assert PLACES[name](changed) == VALUES[name] != PLACES[name](plain)
    others = [place for other, place in PLACES.items() if other != name]
    assert [place(changed) for place in others] == [place(plain) for place in others]


def test_every_argument_of_loading_is_that_of_a_flag(model, monkeypatch):
    """`pad_to_multiple_of` has no flag in pre-training."""
    arguments = {}

    def load(**keywords: Any) -> Any:
        arguments.update(keywords)
        return load_pretraining_model(model)

    monkeypatch.setattr("raybge.losses.retromae_loading.load_pretraining_model", load)
    flags = {"pretrain_method": "dupmae", "bow_loss_weight": 0.25, "cache_dir": "c", "token": "t"}
    flags |= {"trust_remote_code": True, "use_fast_tokenizer": False, "config_name": "n/c", "tokenizer_name": "n/t"}
    PretrainTask(spec_of(model, **flags)).build(ARGS)
    assert arguments == {
        "model_name_or_path": model,
        "config_name": "n/c",
        "tokenizer_name": "n/t",
        "method": "dupmae",
        "bow_loss_weight": 0.25,
        "cache_dir": "c",
        "token": "t",
        "trust_remote_code": True,
        "use_fast_tokenizer": False,
    }


def test_method_and_weight_reach_the_loss(model):
    components = PretrainTask(spec_of(model, pretrain_method="dupmae", bow_loss_weight=0.25)).build(ARGS)
    assert (components.model.method, components.model.bow_loss_weight) == ("dupmae", 0.25)


def test_texts_are_limited_to_what_the_model_holds(model):
    components = PretrainTask(spec_of(model, max_seq_length=999)).build(ARGS)
    assert components.tokenizer.max_seq_length == components.encoder.max_length == 32
