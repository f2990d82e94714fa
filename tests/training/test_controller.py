"""Progress bar of a run that other processes train."""

import math
from types import SimpleNamespace

import pytest

from raybge.training.controller import _update_bar
from raybge.training.health.run_state import Progress

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
