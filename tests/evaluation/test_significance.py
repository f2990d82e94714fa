"""Paired bootstrap against scipy's, and what it says of equal and of different models."""

import numpy as np
import pytest

from raybge.evaluation.significance import compare


def test_the_interval_is_that_of_a_percentile_bootstrap():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(1)
    before = random.beta(2, 1, 150)
    after = np.clip(before + random.normal(0.02, 0.1, 150), 0, 1)
    found = compare(before, after)
    theirs = stats.bootstrap((after - before,), np.mean, n_resamples=10_000, method="percentile", rng=2)
    assert found.mean == pytest.approx((after - before).mean())
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval), abs=1e-3)
    assert found.wins == (after > before).sum() and found.losses == (after < before).sum()


def test_models_that_do_not_differ():
    found = compare(np.arange(9.0), np.arange(9.0))
    assert (found.mean, found.low, found.high, found.wins, found.losses) == (0, 0, 0, 0, 0)
    assert compare(np.zeros(50), np.ones(50)).low == 1 and compare(np.zeros(1), np.ones(1)).low == 1


def test_many_queries():
    """Of two million queries with one of eleven values each; a second call gives the same."""
    random = np.random.default_rng(3)
    before, after = random.integers(0, 11, 2_000_000) / 10, random.integers(0, 11, 2_000_000) / 10
    found = compare(before, after)
    assert found == compare(before, after) and found.high - found.low < 0.003
    half = 1.96 * (after - before).std() / 2_000_000**0.5
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), rel=0.1)
