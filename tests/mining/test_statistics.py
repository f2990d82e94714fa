"""Statistics of chosen negatives, and the likely false negatives among them."""

import numpy as np
import pytest

from raybge.mining import statistics
from raybge.mining.results import above_positive_lines
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


def test_interval_of_the_share_above_the_positive():
    """Negatives of a row resemble each other: the interval is that of the rows, not of single negatives."""
    rng = np.random.default_rng(3)
    hard = rng.random(2000) < 0.2
    negatives = [np.where(rng.random(7) < (0.9 if row else 0.02), 0.8, 0.1) for row in hard]
    result = compared([[0.5]] * len(hard), negatives)
    above = np.array([(row > 0.5).mean() for row in negatives])
    half = 1.96 * above.std() / len(above) ** 0.5
    assert result.above / result.compared == pytest.approx(above.mean())
    assert result.above_interval() == pytest.approx((above.mean() - half, above.mean() + half), abs=2e-3)


def test_lines_on_negatives_above_their_positive():
    assert above_positive_lines(MiningStatistics()) == []
    (line,) = above_positive_lines(compared([[0.5]] * 2, [[0.1, 0.2]] * 2))
    assert line == "0.0% of the negatives (0 of 4) score above the best positive of their row"
    line, advice = above_positive_lines(compared([[0.5]] * 20, [[0.1, 0.9], [0.1, 0.2]] * 10))
    assert line.startswith("25.0% of the negatives (10 of 40; 95% interval 1") and "--relative_margin 0.05" in advice


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
