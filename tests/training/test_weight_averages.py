"""Averaged weights against slow formulas, without Ray: after a resume, by evaluation, with adapters."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tiny
from trainers import FailAt, RunLost, ScriptedValidation, build_survey, build_trainer, weights

from raybge.evaluation.weight_versions import WEIGHT_VERSIONS, versions_in
from raybge.training.averaging_spec import AveragingPlan
from raybge.training.checkpoint.manifest import checkpoint_name, latest_checkpoint, list_checkpoints
from raybge.training.final_weights import final_metrics
from raybge.util.errors import UserError

UPDATES = 18
STEPS = (8, 12, 16)  # checkpoints that are averaged


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple:
    folder = tmp_path_factory.mktemp("inputs")
    return build_survey(folder), make_tiny(folder / "tiny", dropout=0.1)


class WeightsPerUpdate(FailAt):
    """Records the weights after each update, and loses the run at the beginning of the update after `step`."""

    def __init__(self, step: int = -1):
        super().__init__(step)
        self.trainer = None
        self.weights = []

    def on_step_end(self, args, state, control, **_):
        self.weights.append(weights(self.trainer))


def trainer_of(inputs, folder: Path, plan: AveragingPlan, recorder=None, validation=None, **flags):
    callbacks = [recorder] if recorder else []
    flags = {"save_strategy": "steps", "save_steps": 4} | flags
    trainer = build_trainer(*inputs, folder, callbacks, validation, averaging=plan, **flags)
    if recorder:
        recorder.trainer = trainer
    return trainer


def saved_weights(trainer) -> dict[str, torch.Tensor]:
    """Train if not done, give the model its final weights, and return them."""
    trainer.train()
    final_metrics(trainer)
    return weights(trainer)


def assert_close(actual, expected, tolerance=1e-7):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name].to(value.dtype), atol=tolerance, rtol=1e-6, msg=name)


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_ema_equals_its_definition(inputs, tmp_path, decay):
    """The mean of the weights after each update, weighted by decay ** age, in float64."""
    recorder = WeightsPerUpdate()
    actual = saved_weights(trainer_of(inputs, tmp_path / "out", AveragingPlan(ema=decay), recorder))
    factors = [decay ** (UPDATES - step) for step in range(1, UPDATES + 1)]
    expected = {
        name: sum(f * each[name].double() for f, each in zip(factors, recorder.weights, strict=True)) / sum(factors)
        for name in actual
    }
    assert_close(actual, expected, 1e-6)
    last = recorder.weights[-1]
    assert max(float((actual[name] - last[name]).abs().max()) for name in actual) > 1e-4


def test_mean_of_checkpoints_equals_that_of_the_weights_after_their_updates(inputs, tmp_path):
    recorder = WeightsPerUpdate()
    actual = saved_weights(trainer_of(inputs, tmp_path / "out", AveragingPlan(steps=STEPS), recorder))
    expected = {name: sum(recorder.weights[step - 1][name].double() for step in STEPS) / 3 for name in actual}
    assert_close(actual, expected)


@pytest.mark.parametrize("plan", [AveragingPlan(ema=0.9), AveragingPlan(steps=STEPS)], ids=["ema", "checkpoints"])
def test_a_resumed_run_has_the_averages_of_an_undisturbed_one(inputs, tmp_path, plan):
    """Lost in the middle of the second epoch, between two checkpoints. The checkpoint limit deletes others."""
    expected = saved_weights(trainer_of(inputs, tmp_path / "whole", plan))
    again = saved_weights(trainer_of(inputs, tmp_path / "again", plan))
    lost = trainer_of(inputs, tmp_path / "lost", plan, WeightsPerUpdate(14), save_total_limit=3)
    with pytest.raises(RunLost):
        lost.train()
    lost.wait_for_checkpoint()
    resumed = trainer_of(inputs, tmp_path / "lost", plan, save_total_limit=3)
    start = latest_checkpoint(tmp_path / "lost")
    assert start.step == 12
    resumed.train(resume_from_checkpoint=start.path)
    final_metrics(resumed)
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]) and torch.equal(value, again[name]), name


def test_a_checkpoint_of_a_stopped_run_has_no_part_in_the_mean(inputs, tmp_path):
    """Nor does it displace one that has, where --save_total_limit is the number of averaged checkpoints."""
    plan = AveragingPlan(steps=STEPS)
    expected = saved_weights(trainer_of(inputs, tmp_path / "whole", plan))

    class Stop(WeightsPerUpdate):
        def on_step_end(self, args, state, control, **_):
            if state.global_step in (13, 17):
                control.should_save = True

    trainer = trainer_of(inputs, tmp_path / "out", plan, Stop(), save_total_limit=3)
    trainer.train()
    names = {checkpoint_name(path) for path in list_checkpoints(tmp_path / "out")}
    assert {f"checkpoint-{step}" for step in STEPS} <= names and "checkpoint-4" not in names
    final_metrics(trainer)
    assert_close(weights(trainer), expected, 0)


def test_ema_of_a_run_without_one_cannot_be_continued(inputs, tmp_path):
    trainer_of(inputs, tmp_path / "out", AveragingPlan(), max_steps=4).train()
    other = trainer_of(inputs, tmp_path / "out", AveragingPlan(ema=0.9), max_steps=8)
    with pytest.raises(UserError, match="cannot be continued with --ema: its run had no such average; remove --ema"):
        other.train(resume_from_checkpoint=latest_checkpoint(tmp_path / "out").path)


def test_ema_of_another_decay_cannot_be_continued(inputs, tmp_path):
    trainer_of(inputs, tmp_path / "out", AveragingPlan(ema=0.5), max_steps=4).train()
    other = trainer_of(inputs, tmp_path / "out", AveragingPlan(ema=0.9), max_steps=8)
    with pytest.raises(UserError, match="--ema 0.9: the run to continue has --ema 0.5; use the same"):
        other.train(resume_from_checkpoint=latest_checkpoint(tmp_path / "out").path)


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluated(inputs, folder: Path, values: list[float], **settings):
    """Return a trained trainer and its results where evaluations have these values of nDCG@10, the last one first."""
    plan = AveragingPlan(ema=0.9, steps=STEPS, **settings)
    trainer = trainer_of(inputs, folder, plan, validation=ScriptedValidation(values))
    trainer.train()
    return trainer, final_metrics(trainer)


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_better_weights_are_kept(inputs, tmp_path, best):
    values = [0.5, 0.5, 0.5]
    values[best] = 0.75
    trainer, results = evaluated(inputs, tmp_path / "out", values, keep_better=True)
    assert results["eval_nDCG@10"] == 0.75 and results["eval_MRR@10"] == 0.375
    versions = versions_in(json.loads(json.dumps(results)))
    assert [version.name for version in versions] == ["last", "EMA 0.9", "mean of 3 checkpoints"]
    assert [version.saved for version in versions] == [index == best for index in range(3)]
    assert [version.changes[0].after for version in versions] == values
    assert {version.changes[0].before for version in versions} == {values[0]}
    assert versions[best].rows[0][0].endswith(" (saved)") and versions[best].rows[0][2] == "0.7500"
    plans = [AveragingPlan(), AveragingPlan(ema=0.9), AveragingPlan(steps=STEPS)]
    expected = saved_weights(trainer_of(inputs, tmp_path / "other", plans[best]))
    for name, value in weights(trainer).items():
        assert torch.equal(value, expected[name]), name


def test_equal_evaluations_keep_the_last_weights(inputs, tmp_path):
    _, results = evaluated(inputs, tmp_path / "out", [0.5, 0.5, 0.5], keep_better=True)
    assert [each["saved"] for each in results[WEIGHT_VERSIONS]] == [True, False, False]


def test_the_average_is_saved_even_if_it_is_worse(inputs, tmp_path):
    plan = AveragingPlan(ema=0.9)
    trainer = trainer_of(inputs, tmp_path / "out", plan, validation=ScriptedValidation([0.75, 0.5]))
    trainer.train()
    results = final_metrics(trainer)
    assert results["eval_nDCG@10"] == 0.5
    assert [(each["weights"], each["saved"]) for each in results[WEIGHT_VERSIONS]] == [
        ("last", False),
        ("EMA 0.9", True),
    ]


def test_without_averages_there_are_no_versions(inputs, tmp_path):
    trainer = trainer_of(inputs, tmp_path / "out", AveragingPlan(), validation=ScriptedValidation([0.75]))
    trainer.train()
    assert WEIGHT_VERSIONS not in final_metrics(trainer)


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_are_averaged_alone(inputs, tmp_path):
    """The model's own weights stay, and the state in a checkpoint has the adapters only."""
    from raybge.model.lora import Lora

    plan = AveragingPlan(ema=0.9)
    recorder = WeightsPerUpdate()
    trainer = trainer_of(inputs, tmp_path / "out", plan, recorder, lora=Lora(4, 8, 0.1, None))
    before = weights(trainer)
    after = saved_weights(trainer)
    state = torch.load(tmp_path / "out" / "checkpoint-4" / "ema.pt", weights_only=True)["averages"]
    assert state and all("lora" in name for name in state)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all("lora" in name for name in changed)
    factors = np.array([0.9 ** (UPDATES - step) for step in range(1, UPDATES + 1)])
    for name in changed:
        expected = sum(f * each[name].double() for f, each in zip(factors, recorder.weights, strict=True))
        torch.testing.assert_close(after[name], (expected / factors.sum()).float(), atol=1e-6, rtol=1e-5)


def test_adapters_of_checkpoints_are_averaged(inputs, tmp_path):
    from raybge.model.lora import Lora

    recorder = WeightsPerUpdate()
    plan = replace(AveragingPlan(), steps=STEPS)
    after = saved_weights(trainer_of(inputs, tmp_path / "out", plan, recorder, lora=Lora(4, 8, 0.1, None)))
    expected = {name: sum(recorder.weights[step - 1][name].double() for step in STEPS) / 3 for name in after}
    assert_close(after, expected)
