"""Progress bar of a run that other processes train, and the cause of its end."""

import math
from types import SimpleNamespace

import pytest

from raybge.cli.progress_bar import ProgressBar
from raybge.training.controller import _evaluation_line, _root_cause, _update_bar
from raybge.training.health.run_state import Progress
from raybge.util.activity import STARTING, Activity
from raybge.util.errors import UserError

ORDER = SimpleNamespace(steps=5, total=18, global_batch=4)  # of an epoch
CONFIG = SimpleNamespace(order=ORDER, identity=SimpleNamespace(gradient_accumulation_steps=2))


@pytest.mark.parametrize(
    ("progress", "text", "rows"),
    [
        (Progress(total=6), "step 0/6", 0),
        (Progress(total=6, step=4, loss=0.5), "loss 0.5000, step 4/6", 26),
        (Progress(total=6, step=3, loss=math.nan), "loss nan, step 3/6", 18),
    ],
)
def test_bar_shows_rows_loss_and_step(progress, text, rows):
    """An epoch has 3 updates, the last with the remaining 2 groups; there is no loss before the first report."""
    bar = ProgressBar("train", lambda: None)
    _update_bar(progress, CONFIG, bar)
    assert (bar.note, bar.n, bar.total) == (text, rows, 36)


@pytest.mark.parametrize(
    ("activity", "started_at", "text"),
    [
        (None, None, "starting the workers"),
        (Activity(STARTING, 0.0, 0), None, "starting the workers"),
        (Activity(STARTING, 0.0, 0, phase="loading the model"), None, "loading the model"),
        (Activity(STARTING, 0.0, 0), 0, "reading the first rows"),
        (Activity("gathering", 0.0, 3, True, phase="evaluating before training"), 0, "evaluating before training"),
        (Activity("the forward pass of step 1", 0.0, 3), 0, ""),
        (Activity("saving a checkpoint", 0.0, 9, phase="saving a checkpoint"), 0, "saving a checkpoint"),
    ],
)
def test_bar_names_the_activity_of_worker_0(activity, started_at, text):
    bar = ProgressBar("train", lambda: None)
    _update_bar(Progress(total=6, started_at=started_at, activity=activity), CONFIG, bar)
    assert bar.activity == text and (f"{text} …" in bar.line()) == bool(text)


def test_rate_of_a_resumed_run_counts_its_own_rows(monkeypatch):
    """It resumes after 3 of 6 updates (18 of 36 rows); an evaluation is part of the time, the start is not."""
    times = iter([0, 100, 100, 112, 112, 112])
    bar = ProgressBar("train", lambda: None)
    monkeypatch.setattr("raybge.cli.progress_bar.monotonic", lambda: next(times))
    step = Activity("step 4", 0.0, 0)
    _update_bar(Progress(total=6, step=3, started_at=3, activity=step), CONFIG, bar)
    _update_bar(Progress(total=6, step=4, started_at=3, activity=step, evaluation_seconds=5.0), CONFIG, bar)
    monkeypatch.setattr("raybge.cli.progress_bar.monotonic", lambda: 113)
    assert bar.n == 26 and bar.rate == 8 / 12 and bar.seconds_left == 10 / (8 / 12) + 5 - 1


def test_evaluations_are_compared_with_the_one_before_training():
    first, second = {"nDCG@10": 0.4, "MRR@10": 0.3}, {"nDCG@10": 0.45, "MRR@10": 0.3}
    progress = Progress(total=2000, evaluations=[(0, first), (1000, second)])
    assert _evaluation_line(0, first, progress) == "before training: nDCG@10 0.4000, MRR@10 0.3000"
    assert _evaluation_line(1000, second, progress) == (
        "step 1,000 of 2,000: nDCG@10 0.4500 (+0.0500), MRR@10 0.3000 (+0.0000)"
    )
    resumed = Progress(total=2000, evaluations=[(1000, second)])
    assert _evaluation_line(1000, second, resumed) == "step 1,000 of 2,000: nDCG@10 0.4500, MRR@10 0.3000"


class DistBackendError(RuntimeError):
    """Named like torch's error for a broken connection."""


CONNECTION = RuntimeError("[gloo/transport] Connection closed by peer")


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([ValueError("broken")], 0),
        ([CONNECTION, ValueError("broken")], 1),
        ([DistBackendError("closed"), ValueError("broken")], 1),
        ([RuntimeError("NCCL communicator was aborted"), ValueError("broken")], 1),
        ([ValueError("broken"), UserError("--x must be y")], 1),  # retrying does not help
        ([CONNECTION, DistBackendError("closed")], 0),
    ],
)
def test_the_root_cause_is_the_error_that_a_worker_raised(failures, cause):
    """Inside the wrappers of Ray Train and Ray; errors in the collectives of other workers are consequences."""
    from ray.exceptions import RayTaskError
    from ray.train.v2.api.exceptions import WorkerGroupError

    assert _root_cause(WorkerGroupError("workers failed", dict(enumerate(failures)))) is failures[cause]
    wrapped = {rank: RayTaskError("train", "traceback", error) for rank, error in enumerate(failures)}
    outer = RuntimeError("training failed")
    outer.__cause__ = WorkerGroupError("workers failed", wrapped)
    assert _root_cause(outer) is failures[cause]


def test_the_root_cause_without_workers_is_the_innermost_error():
    error, inner = RuntimeError("outer"), OSError("inner")
    error.__cause__ = inner
    assert _root_cause(error) is inner and _root_cause(inner) is inner
