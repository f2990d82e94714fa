"""Ray Tune with trials that only compute a number: concurrency, resources, and population based training."""

import sys
import time
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from raybge.cli.options import TrainOptions, TuneOptions
from raybge.cli.parser import build_options, declared_flags
from raybge.cluster.placement_groups import record_placement_group, release_placement_group
from raybge.training.checkpoint.manifest import MANIFEST
from raybge.tuning import ray_tune as search_module
from raybge.tuning.ray_tune import RayTuneSearch
from raybge.tuning.records import best_trial
from raybge.tuning.search_space_parser import parse_search_space
from raybge.tuning.spec import PACKAGES, SearchAlgorithmSpec
from raybge.tuning.trial import MINED, run_trial
from raybge.tuning.trial_spec import TrialSpec

STEPS = 3  # evaluations of a trial
TRAINING_FLAGS = {"model_name_or_path": "m", "train_data": ["d"]}
FLAGS = {**TRAINING_FLAGS, "output_dir": "o", "metric": "nDCG@10"}


@pytest.fixture(scope="module", autouse=True)
def two_cpus():
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.shutdown()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def train(value: float, learning_rate: float) -> float:
    """Return the value after one step; the largest learning rate is best."""
    return value * 0.9 + learning_rate


def reserve(output):
    """Take all CPUs in a placement group of an actor, as a run does; it remains when the trial is stopped."""
    release_placement_group(output)  # at the beginning, as each run does
    group = ray.util.placement_group([{"CPU": 2}])
    assert group.wait(60), "the placement group of another trial was not released"
    record_placement_group(output, group)


def fake_train(options, console, context):
    """Train like raybge.train with a number as the model, and record begin and end in a file."""
    output, start = options.training["output_dir"], options.training.get("resume_from_checkpoint")
    reserve(output)
    value = float(Path(start, "value").read_text()) if start else 0.0
    done = int(start.rpartition("-")[2]) if start else 0
    with open(Path(output).parents[1] / "events", "a", buffering=1) as events:
        print("begin", file=events)
        for step in range(done + 1, STEPS + 1):
            time.sleep(0.1)
            value = train(value, options.training["learning_rate"])
            if options.storage_path:
                place = Path(options.storage_path, f"checkpoint-{step}")
                place.mkdir()
                (place / "value").write_text(repr(value))
                (place / MANIFEST).touch()
            if step == STEPS:
                print("end", file=events)
            assert context.on_evaluation(step, STEPS, {"nDCG@10": value})


def fake_mine(options, console):
    """Take a CPU, as mining does."""
    Path(options.output_file).write_text(ray.get(ray.remote(lambda: "mined").options(num_cpus=1).remote()))


def fake_trial(config, trial_spec):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raybge.mining.run.mine", fake_mine)
        patch.setattr("raybge.training.run.train", fake_train)
        run_trial(config, trial_spec)


@pytest.fixture
def search(tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "run_trial", fake_trial)

    def run(name, runs, mining=None, **flags):
        space = parse_search_space(["learning_rate=loguniform(1e-4,1)"], declared_flags(TrainOptions))
        spec = SearchAlgorithmSpec.from_options(build_options(TuneOptions, FLAGS | flags), space)
        folder = tmp_path / name
        (folder / "trials").mkdir(parents=True)
        trial_spec = TrialSpec(TRAINING_FLAGS, str(folder / "trials"), runs, "", mining, spec.pauses_trials)
        trials = RayTuneSearch(spec, trial_spec, folder, lambda trials: None).run()
        return trials, (folder / "trials" / "events").read_text().split()

    return run


@pytest.mark.parametrize("search_alg", ["random", "optuna", "hyperopt"])
def test_concurrent_trials_are_limited(search, search_alg):
    for package in PACKAGES.get(search_alg, ()):
        pytest.importorskip(package, reason=f"{package} is not installed: an optional package")
    trials, events = search("out", 1, num_samples=2, scheduler="none", search_alg=search_alg)
    assert [trial.status for trial in trials] == ["finished"] * 2 and events == ["begin", "end"] * 2


def test_resources_of_stopped_trials_are_released(search):
    """Each trial takes all CPUs; the search stops those that are worse than an earlier one."""
    trials, events = search("out", 1, num_samples=4, scheduler="asha", search_alg="random", seed=3)
    assert {trial.status for trial in trials} == {"finished", "stopped"} and events.count("begin") == 4


def test_mining_uses_the_cpus_of_the_later_training(search, tmp_path):
    mining = {"model_name_or_path": "m", "negative_number": 3}
    trials, _ = search("out", 1, mining, num_samples=2, scheduler="none")
    assert [trial.status for trial in trials] == ["finished"] * 2
    assert [path.read_text() for path in (tmp_path / "out").rglob(MINED)] == ["mined"]  # of the best trial


def test_population_continues_from_its_best_trial(search):
    trials, events = search("out", 1, num_samples=3, scheduler="pbt", seed=5)
    assert [trial.status for trial in trials] == ["finished"] * 3
    assert events.count("end") == 3 and events.count("begin") > 4  # one at a time, each pausing for the others
    for trial in trials:
        value = 0.0
        for step in range(STEPS):
            value = train(value, [flags for since, flags in trial.history if since <= step][-1]["learning_rate"])
        assert trial.metrics["nDCG@10"] == pytest.approx(value, rel=1e-12)
    best = best_trial(trials, "nDCG@10", "max")
    replaced = [trial for trial in trials if len(trial.history) > 1]
    assert replaced and all(trial.history[-1][1] == trial.flags for trial in trials)
    # a replaced trial has the first values of another one
    initial = {trial.history[0][1]["learning_rate"] for trial in trials}
    assert len(initial) < 3 and best.history[0][1]["learning_rate"] == max(initial)


def test_bohb_stops_and_continues_trials(search):
    for package in PACKAGES["bohb"]:
        pytest.importorskip(package, reason=f"{package} is not installed: an optional package")
    trials, events = search("out", 1, num_samples=5, search_alg="bohb", seed=5)
    assert {trial.status for trial in trials} == {"finished", "stopped"}
    by_rate = sorted(trials, key=lambda trial: trial.flags["learning_rate"])
    assert by_rate[0].status == "stopped" and by_rate[-1].status == "finished"
    assert events.count("begin") > len(trials)  # some paused
    for trial in trials:
        value = 0.0
        for _ in range(trial.curve[-1][0]):
            value = train(value, trial.flags["learning_rate"])
        assert trial.metrics["nDCG@10"] == value and len(trial.history) == 1
