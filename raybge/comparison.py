"""Whether one model retrieves better than another: paired bootstrap over the queries.

The queries are drawn anew, with replacement, many times; how much the mean difference varies says how far it could be
chance (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13: percentile intervals).

Letters in array names: Q queries, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SAMPLES, LEAST = 10_000, 200  # fewer of more queries, whose mean varies less
MOST_DRAWS = 1 << 28
LEVEL = 0.95
_AT_ONCE = 1 << 22  # draws


@dataclass(frozen=True)
class Difference:
    """The mean of one metric's differences and its interval, and for how many queries it rose and fell."""

    mean: float
    low: float
    high: float
    wins: int
    losses: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def compare(before_Q: np.ndarray, after_Q: np.ndarray, seed: int = 0) -> Difference:
    """What changed from one model's values to another's, of the same queries in the same order."""
    difference_Q = np.asarray(after_Q, np.float64) - np.asarray(before_Q, np.float64)
    samples = min(SAMPLES, max(LEAST, MOST_DRAWS // len(difference_Q)))
    random = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // len(difference_Q))
    means = []
    for start in range(0, samples, rows):
        drawn = random.integers(len(difference_Q), size=(min(rows, samples - start), len(difference_Q)))
        means.append(difference_Q[drawn].mean(axis=1))
    mean_S = np.concatenate(means)
    low, high = np.quantile(mean_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    wins, losses = int((difference_Q > 0).sum()), int((difference_Q < 0).sum())
    return Difference(float(difference_Q.mean()), float(low), float(high), wins, losses)
