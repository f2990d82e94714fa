"""Statistics of chosen negatives, and the likely false negatives among them."""

import numpy as np
import pytest

from raybge.mining import statistics
from raybge.mining.statistics import MiningStatistics

NAN = float("nan")


def compared(positives, negatives, first=0):
    """Return statistics of rows ("q i", positives "p i.j", negatives "n 10i+j")."""
    result = MiningStatistics(rows=len(positives))
    rows = range(first, first + len(positives))
    texts = [(f"q {i}", [f"p {i}.{j}" for j in range(len(p))]) for i, p in zip(rows, positives, strict=True)]
    ids = [np.arange(10 * i, 10 * i + len(n)) for i, n in zip(rows, negatives, strict=True)]
    passages = {int(i): f"n {i}" for each in ids for i in each}
    arrays = ([np.array(each, np.float32) for each in side] for side in (positives, negatives))
    result.compare(texts, *arrays, ids, passages)
    return result


def test_negatives_are_compared_with_the_best_positive():
    result = compared(
        [[0.5, 0.75, NAN], [0.25], [NAN], [0.5], [0.5]], [[0.5, 0.625], [0.5, NAN, 0.375], [1], [], [NAN]]
    )
    assert (result.compared, result.above) == (4, 2)
    pairs = [(s.query, s.positive, s.negative, s.positive_score, s.negative_score) for s in result.false_negatives]
    assert pairs == [("q 1", "p 1.0", "n 10", 0.25, 0.5), ("q 0", "p 0.1", "n 1", 0.75, 0.625)]
    assert [s.gap for s in result.false_negatives] == [0.25, -0.125]


def test_blocks_add_up_and_the_largest_gaps_remain(monkeypatch):
    monkeypatch.setattr(statistics, "MAX_FALSE_NEGATIVES", 3)
    rng = np.random.default_rng(0)
    positives, negatives = rng.random((40, 2)), rng.random((40, 5))
    whole = compared(positives, negatives)
    parts = MiningStatistics()
    for start in range(0, 40, 8):
        part = compared(positives[start : start + 8], negatives[start : start + 8], start)
        part.ranks.update([start, 3])
        part.counts.update([5] * 8)
        parts.add(part)
    assert parts.false_negatives == whole.false_negatives and len(whole.false_negatives) == 3
    assert (parts.compared, parts.above, parts.rows) == (whole.compared, whole.above, 40)
    assert parts.counts == {5: 40} and parts.ranks == {0: 1, 3: 5, 8: 1, 16: 1, 24: 1, 32: 1}


@pytest.mark.parametrize("length", [3, 5000])
def test_texts_are_truncated(length):
    result = MiningStatistics()
    result.compare([("q" * length, ["p" * length])], [np.ones(1)], [np.ones(1)], [np.zeros(1)], {0: "n" * length})
    (pair,) = result.false_negatives
    assert {len(pair.query), len(pair.positive), len(pair.negative)} == {min(length, statistics.MAX_TEXT)}
