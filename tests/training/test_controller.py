"""Progress bar of a run that other processes train, and the cause of its end."""

import math
from types import SimpleNamespace

import pytest

from raybge.training.controller import _root_cause, _update_bar
from raybge.training.health.run_state import Progress
from raybge.util.errors import UserError

ORDER = SimpleNamespace(steps=5, total=18, global_batch=4)  # of an epoch
CONFIG = SimpleNamespace(order=ORDER, identity=SimpleNamespace(gradient_accumulation_steps=2))


class FakeBar:
    """Progress bar that keeps the last values."""

    n = 0

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.text = text

    def update(self, rows: int) -> None:
        self.n += rows


@pytest.mark.parametrize(
    ("progress", "text", "rows"),
    [
        (Progress(total=6), "step 0/6", 0),
        (Progress(total=6, step=4, loss=0.5), "loss 0.5000, step 4/6", 26),
        (Progress(total=6, step=3, loss=math.nan), "loss nan, step 3/6", 18),
        (
            Progress(total=6, step=6, loss=1.0, evaluations=[(3, {"nDCG@10": 0.25})]),
            "loss 1.0000, step 6/6, nDCG@10 0.2500",
            36,
        ),
    ],
)
def test_bar_shows_rows_loss_step_and_metric(progress, text, rows):
    """An epoch has 3 updates, the last with the remaining 2 groups; there is no loss before the first report."""
    bar = FakeBar()
    _update_bar(progress, CONFIG, bar)
    assert (bar.text, bar.n, bar.total) == (text, rows, 36)


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
