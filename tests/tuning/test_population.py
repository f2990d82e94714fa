"""Population based training: attempts and their history, the scheduler, and the flags that can be searched."""

import json
from pathlib import Path

import numpy as np
import pytest
from ray import tune

from raybge.cli.options import TrainOptions, TuneOptions
from raybge.cli.parser import build_options, declared_flags
from raybge.training.checkpoint.manifest import MANIFEST
from raybge.tuning.command_lines import reproduction_commands
from raybge.tuning.population import TrialAttempt, check_population, pbt_scheduler, read_history, trial_resources
from raybge.tuning.search_space_parser import parse_search_space
from raybge.tuning.spec import SearchAlgorithmSpec
from raybge.tuning.trial_spec import TrialSpec
from raybge.util.errors import UserError

FLAGS = {"model_name_or_path": "m", "train_data": ["d"], "output_dir": "o", "scheduler": "pbt"}


def space(*texts):
    return parse_search_space(texts, declared_flags(TrainOptions))


def train_attempt(trial: Path, flags: dict, checkpoint=None, *steps: int) -> list:
    """Begin an attempt, write checkpoints after the given updates, and return pointers to them."""
    attempt = TrialAttempt.begin(trial, flags, checkpoint)
    for step in steps:
        assert not attempt.has_checkpoint(step)
        folder = attempt.folder / f"checkpoint-{step}"
        folder.mkdir()
        (folder / MANIFEST).touch()
        assert attempt.has_checkpoint(step)
    return [attempt.pointer(step) for step in steps]


def test_history_follows_checkpoints_of_other_trials(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    _, at_20 = train_attempt(a, {"learning_rate": 1.0}, None, 10, 20)
    train_attempt(b, {"learning_rate": 5.0}, None, 10)
    assert read_history(b) == [(0, {"learning_rate": 5.0})]
    [at_30] = train_attempt(b, {"learning_rate": 2.0}, at_20, 30)  # replaced
    [at_40] = train_attempt(b, {"learning_rate": 2.0}, at_30, 40)  # paused and continued
    train_attempt(b, {"learning_rate": 3.0}, at_40)
    expected = [(0, 1.0), (20, 2.0), (40, 3.0)]
    assert [(step, flags["learning_rate"]) for step, flags in read_history(b)] == expected
    assert read_history(a) == [(0, {"learning_rate": 1.0})] and read_history(tmp_path / "none") == []

    commands = reproduction_commands(TrialSpec({"train_data": ["d"], "eval_steps": 10}, "t", 1, "s"), read_history(b))
    flags = [dict(zip(words[3::2], words[4::2], strict=True)) for words in commands]
    assert [each["--learning_rate"] for each in flags] == ["1.0", "2.0", "3.0"]
    assert [each["--output_dir"] for each in flags] == ["OUTPUT_DIR-1", "OUTPUT_DIR-2", "OUTPUT_DIR-3"]
    starts = [None, "OUTPUT_DIR-1/checkpoint-20", "OUTPUT_DIR-2/checkpoint-40"]
    assert [each.get("--resume_from_checkpoint") for each in flags] == starts


def test_attempt_trains_in_its_own_folder_from_its_checkpoint(tmp_path):
    [at_10] = train_attempt(tmp_path / "a", {}, None, 10)
    first, second = TrialAttempt(tmp_path / "x", None), TrialAttempt.begin(tmp_path / "b", {}, at_10)
    assert first.step == 0 and first.flags() == {"storage_path": str(tmp_path / "x")}
    assert second.step == 10 and second.flags()["storage_path"] == str(second.folder)
    assert second.flags()["resume_from_checkpoint"] == str(tmp_path / "a" / "attempts" / "0" / "checkpoint-10")
    assert json.loads((second.folder / "attempt.json").read_text())["flags"] == {}


@pytest.mark.parametrize(
    "word", ["learning_rate=loguniform(1e-6,1e-4)", "temperature=quniform(0.02,0.1,0.02)", "max_grad_norm=choice(1,2)"]
)
def test_new_values_stay_in_their_domain(word):
    domains = space(word)
    [(name, domain)] = domains.items()
    scheduler = pbt_scheduler(domains, "percent")
    np.random.seed(0)
    value, values = domain.arguments[0], set()
    for _ in range(200):
        value = scheduler._get_new_config(None, type("Trial", (), {"config": {name: value}}))[0][name]
        values.add(value)
        assert value in domain
    assert len(values) == 2 if domain.categorical else len(values) >= 4
    if not domain.categorical:
        assert min(values) < 1.5 * domain.lo and max(values) > domain.hi / 1.5


@pytest.mark.parametrize("runs", [1, 2, 3, 7, 99])
def test_resources_limit_the_number_of_trials(runs):
    [(name, share)] = trial_resources(runs, "10.0.0.1").items()
    assert name == "node:10.0.0.1"  # which Ray itself does not use
    assert runs * share <= 1 < (runs + 1) * share


@pytest.mark.parametrize(
    ("word", "mines", "message"),
    [
        ("num_train_epochs=choice(1,2)", False, "it can search learning_rate, .* not num_train_epochs"),
        ("learning_rate=uniform(0,1)", True, "--mine_config"),
    ],
)
def test_flags_that_cannot_change_during_training_are_rejected(word, mines, message):
    with pytest.raises(UserError, match=message):
        check_population(space(word), mines)
    check_population(space("learning_rate=uniform(0,1)", "temperature=choice(0.1,0.2)"), False)


def test_population_is_sampled_at_random():
    assert SearchAlgorithmSpec.from_options(build_options(TuneOptions, FLAGS), {}).algorithm == "random"


def test_checkpoints_of_ray_tune_are_pointers(tmp_path):
    [checkpoint] = train_attempt(tmp_path, {}, None, 10)
    assert isinstance(checkpoint, tune.Checkpoint)
    assert sum(path.stat().st_size for path in Path(checkpoint.path).iterdir()) < 1000
