"""Paired bootstrap compared with scipy's, for equal and for different models."""

import numpy as np
import pytest

from raybge.evaluation.significance import compare


def test_interval_equals_a_percentile_bootstrap():
    import scipy.stats as stats

    random = np.random.default_rng(1)
    before = random.beta(2, 1, 150)
    after = np.clip(before + random.normal(0.02, 0.1, 150), 0, 1)
    difference = compare(before, after)
    reference = stats.bootstrap((after - before,), np.mean, n_resamples=10_000, method="percentile", rng=2)
    assert difference.mean == pytest.approx((after - before).mean())
    assert (difference.low, difference.high) == pytest.approx(tuple(reference.confidence_interval), abs=1e-3)
    assert difference.wins == (after > before).sum() and difference.losses == (after < before).sum()


def test_equal_and_constantly_different_models():
    difference = compare(np.arange(9.0), np.arange(9.0))
    assert (difference.mean, difference.low, difference.high, difference.wins, difference.losses) == (0, 0, 0, 0, 0)
    assert compare(np.zeros(50), np.ones(50)).low == 1 and compare(np.zeros(1), np.ones(1)).low == 1


def test_many_queries():
    """Two million queries with eleven distinct values; a second call gives the same interval."""
    random = np.random.default_rng(3)
    before, after = random.integers(0, 11, 2_000_000) / 10, random.integers(0, 11, 2_000_000) / 10
    difference = compare(before, after)
    assert difference == compare(before, after) and difference.high - difference.low < 0.003
    half = 1.96 * (after - before).std() / 2_000_000**0.5
    assert (difference.low, difference.high) == pytest.approx((difference.mean - half, difference.mean + half), rel=0.1)
