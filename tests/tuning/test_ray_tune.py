"""Ray Tune with trials that train nothing: how many run at a time, and how a population goes on."""

import sys
import time
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from raybge.cli.options import TrainOptions, TuneOptions
from raybge.cli.parser import build, declared
from raybge.cluster.placement_groups import note, release
from raybge.training.checkpoint.manifest import RECORD
from raybge.tuning import ray_tune as search_module
from raybge.tuning.ray_tune import PACKAGES, Search, pauses
from raybge.tuning.records import best
from raybge.tuning.search_space import parse
from raybge.tuning.trial import MINED, Task, run_trial

STEPS = 3  # evaluations of a trial
TRAINED = {"model_name_or_path": "m", "train_data": ["d"]}
GIVEN = {**TRAINED, "output_dir": "o", "metric": "nDCG@10"}


@pytest.fixture(scope="module", autouse=True)
def two_cpus():
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def train(value: float, learning_rate: float) -> float:
    """A step of a training that the largest learning rate serves best."""
    return value * 0.9 + learning_rate


def reserve(output):
    """Take all CPUs as a run does: in a placement group of an actor's, which stays when the trial is stopped."""
    release(output)  # as each run begins
    group = ray.util.placement_group([{"CPU": 2}])
    assert group.wait(60), "what another trial held was not given back"
    note(output, group)


def fake_train(arguments, console, context):
    """What raybge.train does, with a number for a model. Files say when it ran."""
    output, start = arguments.training["output_dir"], arguments.training.get("resume_from_checkpoint")
    reserve(output)
    value = float(Path(start, "value").read_text()) if start else 0.0
    done = int(start.rpartition("-")[2]) if start else 0
    with open(Path(output).parents[1] / "ran", "a", buffering=1) as ran:
        print("begin", file=ran)
        for step in range(done + 1, STEPS + 1):
            time.sleep(0.1)
            value = train(value, arguments.training["learning_rate"])
            if arguments.storage_path:
                place = Path(arguments.storage_path, f"checkpoint-{step}")
                place.mkdir()
                (place / "value").write_text(repr(value))
                (place / RECORD).touch()
            if step == STEPS:
                print("end", file=ran)
            assert context.on_measured(step, STEPS, {"nDCG@10": value})


def fake_mine(arguments, console):
    """Needs a CPU, as mining does."""
    Path(arguments.output_file).write_text(ray.get(ray.remote(lambda: "mined").options(num_cpus=1).remote()))


def fake_trial(config, task):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raybge.mining.run.mine", fake_mine)
        patch.setattr("raybge.training.run.train", fake_train)
        run_trial(config, task)


@pytest.fixture
def search(tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "run_trial", fake_trial)

    def run(name, runs, mining=None, **flags):
        arguments = build(TuneOptions, GIVEN | flags)
        folder = tmp_path / name
        (folder / "trials").mkdir(parents=True)
        task = Task(TRAINED, str(folder / "trials"), runs, "", mining, pauses=pauses(arguments))
        space = parse(["learning_rate=loguniform(1e-4,1)"], declared(TrainOptions))
        most = []

        def on_change(trials):
            most.append(sum(trial.status == "running" for trial in trials))

        return Search(arguments, space, task, folder, on_change).run(), (folder / "trials" / "ran").read_text().split()

    return run


@pytest.mark.parametrize("search_alg", ["random", "optuna", "hyperopt"])
def test_no_more_trials_run_than_fit(search, search_alg):
    for package in PACKAGES.get(search_alg, ()):
        pytest.importorskip(package)
    trials, ran = search("out", 1, num_samples=2, scheduler="none", search_alg=search_alg)
    assert [trial.status for trial in trials] == ["finished"] * 2 and ran == ["begin", "end"] * 2


def test_what_a_stopped_trial_held_is_given_back(search):
    """Each trial needs all CPUs; the search stops all that come after a better one."""
    trials, ran = search("out", 1, num_samples=4, scheduler="asha", search_alg="random", seed=3)
    assert {trial.status for trial in trials} == {"finished", "stopped"} and ran.count("begin") == 4


def test_a_trial_mines_with_the_cpus_that_its_training_takes_later(search, tmp_path):
    mining = {"model_name_or_path": "m", "negative_number": 3}
    trials, _ = search("out", 1, mining, num_samples=2, scheduler="none")
    assert [trial.status for trial in trials] == ["finished"] * 2
    assert [path.read_text() for path in (tmp_path / "out").rglob(MINED)] == ["mined"]  # the best one's


def test_a_population_goes_on_from_its_best(search):
    trials, ran = search("out", 1, num_samples=3, scheduler="pbt", seed=5)
    assert [trial.status for trial in trials] == ["finished"] * 3
    assert ran.count("end") == 3 and ran.count("begin") > 4  # one after the other, each pausing for the others
    for trial in trials:
        value = 0.0
        for step in range(STEPS):
            value = train(value, [flags for since, flags in trial.history if since <= step][-1]["learning_rate"])
        assert trial.metrics["nDCG@10"] == pytest.approx(value, rel=1e-12)
    found = best(trials, "nDCG@10", "max")
    replaced = [trial for trial in trials if len(trial.history) > 1]
    assert replaced and all(trial.history[-1][1] == trial.flags for trial in trials)
    # what a replaced trial began with is another one's
    begun = {trial.history[0][1]["learning_rate"] for trial in trials}
    assert len(begun) < 3 and found.history[0][1]["learning_rate"] == max(begun)


def test_bohb_stops_trials_where_they_are_and_goes_on_with_others(search):
    for package in PACKAGES["bohb"]:
        pytest.importorskip(package)
    trials, ran = search("out", 1, num_samples=5, search_alg="bohb", seed=5)
    assert {trial.status for trial in trials} == {"finished", "stopped"}
    by_rate = sorted(trials, key=lambda trial: trial.flags["learning_rate"])
    assert by_rate[0].status == "stopped" and by_rate[-1].status == "finished"
    assert ran.count("begin") > len(trials)  # some paused
    for trial in trials:
        value = 0.0
        for _ in range(trial.curve[-1][0]):
            value = train(value, trial.flags["learning_rate"])
        assert trial.metrics["nDCG@10"] == value and len(trial.history) == 1
