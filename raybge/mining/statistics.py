"""What is counted of the negatives that were chosen, row by row, and the few rows of which texts are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BIN = 0.05  # width of a bar of the histograms
EXAMPLES = 3
SUSPECTS = 20
TEXT = 1000  # characters of a text that are kept


@dataclass(frozen=True)
class Suspect:
    """A row's negative that scores highest beside its positive, the best one where it has several."""

    query: str
    positive: str
    negative: str
    positive_score: float
    negative_score: float

    @property
    def gap(self) -> float:
        return self.negative_score - self.positive_score


@dataclass
class Tally:
    """What is counted of rows, and the first few of them.

    `counts`: rows by how many negatives they have. `ranks`: chosen negatives by their place in the full ranking, from
    0; random ones have none. `above` of `compared` negatives score above the best of their row's positives, where both
    scores are known. `suspects`: the rows whose negatives do so most.
    """

    rows: int = 0
    filled: int = 0
    short: int = 0
    positives: Counter[int] = field(default_factory=Counter)
    negatives: Counter[int] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    ranks: Counter[int] = field(default_factory=Counter)
    compared: int = 0
    above: int = 0
    suspects: list[Suspect] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count another's rows too, which come behind these."""
        self.rows += other.rows
        self.filled += other.filled
        self.short += other.short
        self.positives += other.positives
        self.negatives += other.negatives
        self.examples = (self.examples + other.examples)[:EXAMPLES]
        self.counts += other.counts
        self.ranks += other.ranks
        self.compared += other.compared
        self.above += other.above
        self.suspects = sorted(self.suspects + other.suspects, key=lambda each: -each.gap)[:SUSPECTS]

    def histograms(self) -> dict[str, Any]:
        """How many scores lie in [from, from + width), by `from`."""

        def bars(counted: Counter[int]) -> dict[str, int]:
            return {f"{number * BIN:.2f}": counted[number] for number in sorted(counted)}

        return {"width": BIN, "positives": bars(self.positives), "negatives": bars(self.negatives)}

    def compare(
        self,
        texts: Sequence[tuple[str, Sequence[str]]],
        positives: Sequence[np.ndarray],
        negatives: Sequence[np.ndarray],
        ids: Sequence[np.ndarray],
        passages: Mapping[int, str],
    ) -> None:
        """Set `compared`, `above` and `suspects`.

        Args:
            texts: query and positives of each row.
            positives, negatives: their scores, nan where they are not known.
            ids: the negatives' passage ids, whose texts are `passages`.
        """
        found = []
        for row, (positive_P, negative_N) in enumerate(zip(positives, negatives, strict=True)):
            p, n = _best(positive_P), _best(negative_N)
            if p is None or n is None:
                continue
            self.compared += int(np.isfinite(negative_N).sum())
            self.above += int((negative_N > positive_P[p]).sum())
            found.append((float(negative_N[n] - positive_P[p]), row, p, n))
        for _, row, p, n in sorted(found, key=lambda each: -each[0])[:SUSPECTS]:
            query, answers = texts[row]
            near = passages[int(ids[row][n])]
            scores = float(positives[row][p]), float(negatives[row][n])
            self.suspects.append(Suspect(query[:TEXT], answers[p][:TEXT], near[:TEXT], *scores))


def bins(scores: np.ndarray) -> list[int]:
    """The bar of each score that is a number."""
    return np.floor(scores[np.isfinite(scores)] / BIN).astype(int).tolist()


def _best(score_N: np.ndarray) -> int | None:
    """The place of the highest score that is a number."""
    if not len(score_N):
        return None
    at = int(np.where(np.isfinite(score_N), score_N, -np.inf).argmax())
    return at if np.isfinite(score_N[at]) else None
