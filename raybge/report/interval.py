"""How sure a difference is: the paired bootstrap over queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Change:
    """A metric's mean before and after, and the 95% interval of their difference; what is not known is None."""

    metric: str
    before: float | None
    after: float | None
    low: float | None = None
    high: float | None = None
    queries: int | None = None


def change(metric: str, before_Q: np.ndarray, after_Q: np.ndarray, seed: int = 0) -> Change:
    """What became of a metric, from each query's value before and after.

    The interval is that of the mean difference of queries drawn anew, `RESAMPLES` times as many as there are; a
    function of the values and the seed.
    """
    low, high = interval(after_Q - before_Q, seed)
    return Change(metric, float(before_Q.mean()), float(after_Q.mean()), low, high, len(before_Q))


def interval(difference_Q: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The middle 95% of the resampled means.

    Few differences are distinct (a rank is one of eleven), so how often each one is drawn is drawn instead of the
    queries: the same distribution, in a time that does not grow with their number.
    """
    values_V, count_V = np.unique(difference_Q, return_counts=True)
    drawn_RV = np.random.default_rng(seed).multinomial(len(difference_Q), count_V / len(difference_Q), RESAMPLES)
    mean_R = drawn_RV @ values_V / len(difference_Q)
    low, high = np.quantile(mean_R, [0.025, 0.975]).tolist()
    return low, high
