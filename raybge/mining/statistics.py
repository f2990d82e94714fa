"""Statistics of the chosen negatives: counts of all rows, and the texts of a few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raybge.evaluation.significance import ratio_interval
from raybge.mining.relabelling import RelabelStatistics

BIN = 0.05  # width of a histogram bin
EXAMPLES = 3
MAX_FALSE_NEGATIVES = 20
MAX_TEXT = 1000  # characters of a text that are kept


@dataclass(frozen=True)
class LikelyFalseNegative:
    """A row's highest-scoring negative next to its highest-scoring positive."""

    query: str
    positive: str
    negative: str
    positive_score: float
    negative_score: float

    @property
    def gap(self) -> float:
        """Score of the negative minus that of the positive."""
        return self.negative_score - self.positive_score


@dataclass
class MiningStatistics:
    """Counts of rows and their negatives.

    Args:
        rows: number of rows.
        rows_filled: rows with random passages among their negatives.
        rows_with_fewer: rows with fewer negatives than requested.
        positives: histogram of the positives' scores, by bin number.
        negatives: histogram of the negatives' scores, by bin number.
        examples: query, positive and negative of the first rows.
        counts: rows by their number of negatives.
        ranks: negatives by their 0-based rank in the full ranking; random ones have none.
        above_by_row: rows by two numbers: negatives that score above the best of the row's positives, and negatives
            that were compared with it, since both scores are known.
        false_negatives: rows whose negative exceeds the positive most.
        ranks_rescored: ranks of the range, of all rows, that were rescored in fp32.
        ranks_changed: those of them that then hold another passage.
        relabelling: counts of `--relabel`; the scores and ranks above are those before it.
    """

    rows: int = 0
    rows_filled: int = 0
    rows_with_fewer: int = 0
    positives: Counter[int] = field(default_factory=Counter)
    negatives: Counter[int] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    ranks: Counter[int] = field(default_factory=Counter)
    above_by_row: Counter[tuple[int, int]] = field(default_factory=Counter)
    false_negatives: list[LikelyFalseNegative] = field(default_factory=list)
    ranks_rescored: int = 0
    ranks_changed: int = 0
    relabelling: RelabelStatistics = field(default_factory=RelabelStatistics)

    def add(self, other: MiningStatistics) -> None:
        """Add the statistics of later rows."""
        self.rows += other.rows
        self.rows_filled += other.rows_filled
        self.rows_with_fewer += other.rows_with_fewer
        self.ranks_rescored += other.ranks_rescored
        self.ranks_changed += other.ranks_changed
        self.positives += other.positives
        self.negatives += other.negatives
        self.examples = (self.examples + other.examples)[:EXAMPLES]
        self.counts += other.counts
        self.ranks += other.ranks
        self.above_by_row += other.above_by_row
        self.relabelling.add(other.relabelling)
        pairs = self.false_negatives + other.false_negatives
        self.false_negatives = sorted(pairs, key=lambda each: -each.gap)[:MAX_FALSE_NEGATIVES]

    @property
    def compared(self) -> int:
        """Number of negatives whose score and positive's score are known."""
        return sum(compared * rows for (_, compared), rows in self.above_by_row.items())

    @property
    def above(self) -> int:
        """Number of negatives that score above the best of their row's positives."""
        return sum(above * rows for (above, _), rows in self.above_by_row.items())

    def above_interval(self) -> tuple[float, float]:
        """Return the 95% interval of `above` / `compared`: a bootstrap over the rows."""
        pairs = np.array(sorted(self.above_by_row), np.float64)
        count_V = np.array([self.above_by_row[pair] for pair in sorted(self.above_by_row)])
        return ratio_interval(pairs[:, 0], pairs[:, 1], count_V)

    def histograms(self) -> dict[str, Any]:
        """Return the number of scores in [from, from + width), by `from`."""

        def bars(histogram: Counter[int]) -> dict[str, int]:
            return {f"{number * BIN:.2f}": histogram[number] for number in sorted(histogram)}

        return {"width": BIN, "positives": bars(self.positives), "negatives": bars(self.negatives)}

    def compare(
        self,
        texts: Sequence[tuple[str, Sequence[str]]],
        positives: Sequence[np.ndarray],
        negatives: Sequence[np.ndarray],
        ids: Sequence[np.ndarray],
        passages: Mapping[int, str],
    ) -> None:
        """Set `above_by_row` and `false_negatives`.

        Args:
            texts: query and positives of each row.
            positives: scores of each row's positives, nan if unknown.
            negatives: scores of each row's negatives, nan if unknown.
            ids: passage ids of each row's negatives.
            passages: texts of the passages by id.
        """
        gaps = []
        for row, (positive_P, negative_N) in enumerate(zip(positives, negatives, strict=True)):
            p, n = _best(positive_P), _best(negative_N)
            if p is None or n is None:
                continue
            self.above_by_row[int((negative_N > positive_P[p]).sum()), int(np.isfinite(negative_N).sum())] += 1
            gaps.append((float(negative_N[n] - positive_P[p]), row, p, n))
        for _, row, p, n in sorted(gaps, key=lambda each: -each[0])[:MAX_FALSE_NEGATIVES]:
            query, answers = texts[row]
            negative = passages[int(ids[row][n])]
            scores = float(positives[row][p]), float(negatives[row][n])
            self.false_negatives.append(
                LikelyFalseNegative(query[:MAX_TEXT], answers[p][:MAX_TEXT], negative[:MAX_TEXT], *scores)
            )


def bin_numbers(scores: np.ndarray) -> list[int]:
    """Return the histogram bin of each finite score."""
    numbers: list[int] = np.floor(scores[np.isfinite(scores)] / BIN).astype(int).tolist()
    return numbers


def _best(score_N: np.ndarray) -> int | None:
    """Return the position of the highest finite score; None if there is none."""
    if not len(score_N):
        return None
    at = int(np.where(np.isfinite(score_N), score_N, -np.inf).argmax())
    return at if np.isfinite(score_N[at]) else None
