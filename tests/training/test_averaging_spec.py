"""Flags of averaged weights: each mistake has its message, and the checkpoints of a run are those that it saves."""

import pytest
import transformers
from tiny import make_tiny
from trainers import build_survey, build_trainer

from raybge.cli.options import PretrainOptions, TrainOptions, TuneOptions
from raybge.cli.parser import build_options
from raybge.training.averaging_spec import AveragingPlan, AveragingSpec, checkpoint_steps
from raybge.training.checkpoint.manifest import checkpoint_name, list_checkpoints
from raybge.tuning.spec import TuningSpec
from raybge.util.errors import UserError

REQUIRED = {"model_name_or_path": "m", "train_data": ["d"], "output_dir": "o"}


def spec_of(**flags) -> AveragingSpec:
    return AveragingSpec.from_options(build_options(TrainOptions, REQUIRED | flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ema": 0.0}, "--ema must be above 0 and below 1, found 0"),
        ({"ema": 1.0}, "--ema must be above 0 and below 1, found 1"),
        ({"average_checkpoints": 1}, "--average_checkpoints must be at least 2, found 1"),
        ({"keep_better": True, "eval_data": ["e"]}, "--keep_better requires --eval_data, and --ema or"),
        ({"keep_better": True, "ema": 0.9}, "--keep_better requires --eval_data, and --ema or"),
        ({"ema": 0.9, "average_checkpoints": 2}, "give one of them, or --keep_better"),
        (
            {"ema": 0.9, "load_best_model_at_end": True},
            "--load_best_model_at_end selects one checkpoint, --ema averages",
        ),
        ({"ema": 0.9, "deepspeed": {"a": 1}}, "--ema is not supported with --deepspeed"),
        ({"average_checkpoints": 2, "save_strategy": "no"}, "requires --save_strategy steps or epoch, found no"),
        ({"average_checkpoints": 3, "save_total_limit": 2}, "--save_total_limit is 2"),
        ({"average_checkpoints": 2, "fsdp": "True", "save_only_model": True}, "--save_only_model leaves out"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_flags_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        spec_of(**flags)


@pytest.mark.parametrize("flags", [{"ema": 0.9}, {"average_checkpoints": 2}, {"keep_better": True}], ids=str)
def test_a_search_refuses_averages(flags, tmp_path):
    options = build_options(TuneOptions, REQUIRED | {"model_name_or_path": make_tiny(tmp_path / "tiny")} | flags)
    with pytest.raises(UserError, match=f"--{next(iter(flags))}: trials are compared by their last weights"):
        TuningSpec.from_options(options)


def test_pretraining_averages_without_an_evaluation():
    options = build_options(PretrainOptions, REQUIRED | {"ema": 0.5})
    assert AveragingSpec.from_options(options) == AveragingSpec(0.5, None, False)


def test_the_plan_has_the_last_checkpoints():
    flags = {"save_steps": 4}
    assert spec_of(average_checkpoints=3).plan(flags, 18, 9) == AveragingPlan(None, (12, 16, 18), False)
    assert spec_of(ema=0.9).plan(flags, 18, 9) == AveragingPlan(0.9, (), False)
    assert not AveragingPlan().requested
    with pytest.raises(UserError, match=r"--average_checkpoints 6: this run of 18 updates writes 5 .* \(now 4\)"):
        spec_of(average_checkpoints=6).plan(flags, 18, 9)
    with pytest.raises(UserError, match="writes 2 checkpoints; lower --save_steps .now --save_strategy epoch"):
        spec_of(average_checkpoints=3).plan({"save_strategy": "epoch"}, 18, 9)


def test_the_plan_says_which_weights_are_saved():
    assert spec_of().describe() == []
    assert spec_of(ema=0.9).describe() == ["weights: their exponential moving average (decay 0.9) is saved"]
    (line,) = spec_of(ema=0.9, average_checkpoints=2, keep_better=True, eval_data=["e"]).describe()
    assert "the last ones or their exponential" in line and "or the mean of the last 2 checkpoints" in line


@pytest.mark.parametrize(
    "flags",
    [
        {"save_strategy": "steps", "save_steps": 5},
        {"save_strategy": "steps", "save_steps": 6},
        {"save_strategy": "steps", "save_steps": 0.3},
        {"save_strategy": "epoch"},
        {"save_strategy": "epoch", "max_steps": 13},
        {"save_strategy": "steps", "save_steps": 50},
    ],
    ids=str,
)
def test_checkpoints_are_those_that_the_trainer_saves(tmp_path, flags):
    model = make_tiny(tmp_path / "tiny")
    trainer = build_trainer(build_survey(tmp_path), model, tmp_path / "out", **flags)
    assert isinstance(trainer, transformers.Trainer)
    trainer.train()
    saved = sorted(
        int(checkpoint_name(path).removeprefix("checkpoint-")) for path in list_checkpoints(tmp_path / "out")
    )
    assert checkpoint_steps(flags, trainer.state.max_steps, 9) == saved
