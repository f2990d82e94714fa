"""What a person sees of a run that other processes train."""

import math
from types import SimpleNamespace

import pytest

from raybge.training.controller import _show
from raybge.training.health.run_state import Progress

ORDER = SimpleNamespace(steps=5, total=18, global_batch=4)  # of an epoch
CONFIG = SimpleNamespace(order=ORDER, identity=SimpleNamespace(gradient_accumulation_steps=2))


class Bar:
    """The last that it was told."""

    n = 0

    def set_postfix_str(self, says: str, refresh: bool) -> None:
        self.says = says

    def update(self, groups: int) -> None:
        self.n += groups


@pytest.mark.parametrize(
    ("progress", "says", "groups"),
    [
        (Progress(total=6), "step 0/6", 0),
        (Progress(total=6, step=4, loss=0.5), "loss 0.5000, step 4/6", 26),
        (Progress(total=6, step=3, loss=math.nan), "loss nan, step 3/6", 18),
        (
            Progress(total=6, step=6, loss=1.0, measured=[(3, {"nDCG@10": 0.25})]),
            "loss 1.0000, step 6/6, nDCG@10 0.2500",
            36,
        ),
    ],
)
def test_a_bar_says_groups_loss_step_and_metric(progress, says, groups):
    """Of an epoch of 3 updates, the last with the 2 groups that are left; no loss before there is one."""
    bar = Bar()
    _show(progress, CONFIG, bar)
    assert (bar.says, bar.n, bar.total) == (says, groups, 36)
