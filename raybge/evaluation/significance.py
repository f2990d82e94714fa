"""Whether one model retrieves better than another: the paired bootstrap over the queries.

The queries are drawn anew, with replacement, many times; how much the mean difference varies says how far it could be
chance (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13: percentile intervals).

Letters in array names: Q queries, V distinct differences, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
SAMPLES, LEAST = 10_000, 1000
MOST_DRAWN = 1 << 25  # numbers; of differences that are nearly all distinct, fewer samples are taken


@dataclass(frozen=True)
class Difference:
    """The mean of one metric's differences and its interval, and for how many queries it rose and fell."""

    mean: float
    low: float
    high: float
    wins: int
    losses: int


def compare(before_Q: np.ndarray, after_Q: np.ndarray, seed: int = 0) -> Difference:
    """What changed from one model's values to another's, of the same queries in the same order."""
    difference_Q = np.asarray(after_Q, np.float64) - np.asarray(before_Q, np.float64)
    low, high = interval(difference_Q, seed)
    wins, losses = int((difference_Q > 0).sum()), int((difference_Q < 0).sum())
    return Difference(float(difference_Q.mean()), low, high, wins, losses)


def interval(difference_Q: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The middle LEVEL of the means of resampled differences: a function of the values and the seed.

    Few differences are distinct, so how often each one is drawn is drawn instead of the queries: the same distribution,
    in a time that does not grow with their number.
    """
    value_V, count_V = np.unique(np.asarray(difference_Q, np.float64), return_counts=True)
    samples = min(SAMPLES, max(LEAST, MOST_DRAWN // len(value_V)))
    random, share_V = np.random.default_rng(seed), count_V / len(difference_Q)
    drawn = (random.multinomial(len(difference_Q), share_V) @ value_V for _ in range(samples))
    mean_S = np.fromiter(drawn, np.float64, samples) / len(difference_Q)
    low, high = np.quantile(mean_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high
