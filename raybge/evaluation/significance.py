"""Significance of the difference between two models: paired bootstrap over the queries.

The queries are resampled with replacement many times; the interval covers the middle LEVEL of the mean differences
(percentile intervals; Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13,
https://doi.org/10.1201/9780429246593).

Letters in array names: Q queries, V distinct differences, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
SAMPLES, MIN_SAMPLES = 10_000, 1000
MAX_DRAWS = 1 << 25  # random numbers: with many distinct differences, fewer samples are taken


@dataclass(frozen=True)
class Difference:
    """Difference of one metric between two models.

    Args:
        mean: mean difference.
        low: lower end of its interval.
        high: upper end of its interval.
        wins: number of queries whose value rose.
        losses: number of queries whose value fell.
    """

    mean: float
    low: float
    high: float
    wins: int
    losses: int


def compare(before_Q: np.ndarray, after_Q: np.ndarray, seed: int = 0) -> Difference:
    """Compare two models' values of the same queries in the same order."""
    difference_Q = np.asarray(after_Q, np.float64) - np.asarray(before_Q, np.float64)
    low, high = interval(difference_Q, seed)
    wins, losses = int((difference_Q > 0).sum()), int((difference_Q < 0).sum())
    return Difference(float(difference_Q.mean()), low, high, wins, losses)


def interval(difference_Q: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the middle LEVEL of the means of resampled differences; the same for equal values and seeds.

    Args:
        difference_Q: each query's difference.
        seed: seed of the resampling.

    Returns:
        Lower and upper end of the interval.
    """
    value_V, count_V = np.unique(np.asarray(difference_Q, np.float64), return_counts=True)
    return ratio_interval(value_V, np.ones(len(value_V)), count_V, seed)


def ratio_interval(part_V: np.ndarray, whole_V: np.ndarray, count_V: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the middle LEVEL of the ratio of two sums over resampled queries or rows.

    Few values are distinct, so their counts are drawn from a multinomial distribution instead of drawing queries: the
    same distribution, in a time that does not depend on the number of queries.

    Args:
        part_V: distinct values that are summed above the line.
        whole_V: positive values that are summed below it.
        count_V: number of queries that have each pair of values.
        seed: seed of the resampling.

    Returns:
        Lower and upper end of the interval.
    """
    total = int(count_V.sum())
    samples = min(SAMPLES, max(MIN_SAMPLES, MAX_DRAWS // len(part_V)))
    random, share_V = np.random.default_rng(seed), count_V / total
    draws = (random.multinomial(total, share_V) for _ in range(samples))
    ratio_S = np.fromiter(((draw_V @ part_V) / (draw_V @ whole_V) for draw_V in draws), np.float64, samples)
    low, high = np.quantile(ratio_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high
