"""Population based training: what a trial goes on from, how its model came to be, and what can be searched."""

import json
from pathlib import Path

import numpy as np
import pytest
from ray import tune

from raybge.cli.options import TrainOptions, TuneOptions
from raybge.cli.parser import build, declared
from raybge.training.checkpoint.manifest import RECORD
from raybge.tuning import spec as flags_module
from raybge.tuning.population import Attempt, check, history, resources, scheduler
from raybge.tuning.ray_tune import algorithm
from raybge.tuning.search_space import parse
from raybge.tuning.trial import Task
from raybge.util.errors import UserError

GIVEN = {"model_name_or_path": "m", "train_data": ["d"], "output_dir": "o", "scheduler": "pbt"}


def space(*words):
    return parse(words, declared(TrainOptions))


def grown(trial: Path, drawn: dict, checkpoint=None, *steps: int) -> list:
    """An attempt that came to write checkpoints after so many updates: their pointers."""
    attempt = Attempt.begin(trial, drawn, checkpoint)
    for step in steps:
        assert not attempt.has(step)
        folder = attempt.folder / f"checkpoint-{step}"
        folder.mkdir()
        (folder / RECORD).touch()
        assert attempt.has(step)
    return [attempt.pointer(step) for step in steps]


def test_a_history_goes_through_other_trials(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    _, at_20 = grown(a, {"learning_rate": 1.0}, None, 10, 20)
    grown(b, {"learning_rate": 5.0}, None, 10)
    assert history(b) == [(0, {"learning_rate": 5.0})]
    [at_30] = grown(b, {"learning_rate": 2.0}, at_20, 30)  # replaced
    [at_40] = grown(b, {"learning_rate": 2.0}, at_30, 40)  # paused, and gone on with
    grown(b, {"learning_rate": 3.0}, at_40)
    expected = [(0, 1.0), (20, 2.0), (40, 3.0)]
    assert [(step, drawn["learning_rate"]) for step, drawn in history(b)] == expected
    assert history(a) == [(0, {"learning_rate": 1.0})] and history(tmp_path / "none") == []

    commands = flags_module.commands(Task({"train_data": ["d"], "eval_steps": 10}, "t", 1, "s"), history(b))
    found = [dict(zip(words[3::2], words[4::2], strict=True)) for words in commands]
    assert [each["--learning_rate"] for each in found] == ["1.0", "2.0", "3.0"]
    assert [each["--output_dir"] for each in found] == ["OUTPUT_DIR-1", "OUTPUT_DIR-2", "OUTPUT_DIR-3"]
    starts = [None, "OUTPUT_DIR-1/checkpoint-20", "OUTPUT_DIR-2/checkpoint-40"]
    assert [each.get("--resume_from_checkpoint") for each in found] == starts


def test_an_attempt_trains_in_its_own_folder_from_where_it_is_told(tmp_path):
    [at_10] = grown(tmp_path / "a", {}, None, 10)
    first, second = Attempt(tmp_path / "x", None), Attempt.begin(tmp_path / "b", {}, at_10)
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
    rays = scheduler(domains, "percent")
    np.random.seed(0)
    value, seen = domain.arguments[0], set()
    for _ in range(200):
        value = rays._get_new_config(None, type("Trial", (), {"config": {name: value}}))[0][name]
        seen.add(value)
        assert value in domain
    assert len(seen) == 2 if domain.categorical else len(seen) >= 4
    if not domain.categorical:
        assert min(seen) < 1.5 * domain.lo and max(seen) > domain.hi / 1.5


@pytest.mark.parametrize("runs", [1, 2, 3, 7, 99])
def test_so_many_trials_find_room_and_no_more(runs):
    [(name, share)] = resources(runs, "10.0.0.1").items()
    assert name == "node:10.0.0.1"  # of which Ray itself takes nothing
    assert runs * share <= 1 < (runs + 1) * share


@pytest.mark.parametrize(
    ("word", "mines", "says"),
    [
        ("num_train_epochs=choice(1,2)", False, "it can search learning_rate, .* not num_train_epochs"),
        ("learning_rate=uniform(0,1)", True, "--mine_config"),
    ],
)
def test_what_cannot_change_while_a_trial_trains_is_refused(word, mines, says):
    with pytest.raises(UserError, match=says):
        check(space(word), mines)
    check(space("learning_rate=uniform(0,1)", "temperature=choice(0.1,0.2)"), False)


def test_a_population_is_drawn_at_random():
    assert algorithm(build(TuneOptions, GIVEN), {}) == "random"


def test_rays_checkpoints_are_pointers(tmp_path):
    [found] = grown(tmp_path, {}, None, 10)
    assert isinstance(found, tune.Checkpoint) and sum(path.stat().st_size for path in Path(found.path).iterdir()) < 1000
