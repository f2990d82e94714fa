"""Relabelling of negatives that are taken for positives: they are dropped, promoted, or get soft labels.

In mined and in published data many negatives answer their query, and training on corrected rows gives better models
(RLHN, https://arxiv.org/abs/2505.16967).

Letters in array names: N negatives of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raybge.data.groups import parse_group

MAX_RELABELLED = 20  # examples that are kept
MAX_TEXT = 1000  # characters of an example's text
POSITIVE_GRADE, BEST_GRADE = 2, 3  # of a judge: lowest grade of a positive, highest grade
_ACTIONS = {
    "drop": "dropped",
    "promote": "promoted to positives",
    "soft": "kept with soft labels",
}


@dataclass(frozen=True)
class RelabelSpec:
    """Treatment of negatives that are taken for positives.

    Args:
        action: "drop", "promote", or "soft": they stay negatives, and the scores of the row become its labels.
        margin: a cross-encoder takes a negative for a positive if its score exceeds that of the row's best positive by
            more than this.
    """

    action: str
    margin: float = 0.0

    @property
    def outcome(self) -> str:
        """Description of what happens to the negatives, such as "dropped"."""
        return _ACTIONS[self.action]


@dataclass
class RelabelStatistics:
    """Counts of a relabelling, and examples.

    Args:
        judged: negatives that were judged.
        relabelled: of these, the ones that were taken for positives.
        rows: rows with such negatives.
        rows_without_negatives: rows that lost all their negatives.
        rows_failed: rows without a judgment, which are as they were.
        examples: query, positive, negative and verdict of the first rows with such negatives.
    """

    judged: int = 0
    relabelled: int = 0
    rows: int = 0
    rows_without_negatives: int = 0
    rows_failed: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, other: RelabelStatistics) -> None:
        """Add the statistics of later rows."""
        self.judged += other.judged
        self.relabelled += other.relabelled
        self.rows += other.rows
        self.rows_without_negatives += other.rows_without_negatives
        self.rows_failed += other.rows_failed
        self.examples = (self.examples + other.examples)[:MAX_RELABELLED]

    def counts(self) -> dict[str, int]:
        """Return the counts by their names in results and metadata."""
        return {
            "negatives_judged": self.judged,
            "negatives_relabelled": self.relabelled,
            "rows_relabelled": self.rows,
            "rows_without_negatives": self.rows_without_negatives,
            "rows_not_judged": self.rows_failed,
        }


def relabel_by_scores(raw: dict[str, Any], relabel: RelabelSpec, statistics: RelabelStatistics) -> None:
    """Relabel a row by the cross-encoder's scores that it has.

    With "soft", a negative that is taken for a positive has the score of the best positive: distillation then rates
    them alike, and the positive never below.

    Args:
        raw: the row with `pos_scores` and `neg_scores`; it is changed.
        relabel: what to do.
        statistics: counts, which are increased.
    """
    best = max(raw["pos_scores"])
    taken_N = [score > best + relabel.margin for score in raw["neg_scores"]]
    verdicts = [f"score {score:g}, best positive {best:g}" for score in raw["neg_scores"]]
    _count(raw, taken_N, verdicts, statistics)
    if relabel.action == "soft":
        scores = zip(raw["neg_scores"], taken_N, strict=True)
        raw["neg_scores"] = [best if taken else score for score, taken in scores]
    else:
        _move(raw, taken_N, relabel, statistics)


def relabel_by_grades(
    raw: dict[str, Any], grades: Sequence[int] | None, relabel: RelabelSpec, statistics: RelabelStatistics
) -> None:
    """Relabel a row by a judge's grades.

    With "soft" the grades are the scores of the negatives, and the positives have the highest one. A row without
    grades then gets those that its labels stand for: all rows of a file must have scores.

    Args:
        raw: the row; it is changed.
        grades: grade of each negative; None if there are none, and the row stays as it is.
        relabel: what to do.
        statistics: counts, which are increased.
    """
    negatives = parse_group(raw).neg
    if grades is None:
        statistics.rows_failed += 1
        grades = [0] * len(negatives)
    else:
        taken_N = [grade >= POSITIVE_GRADE for grade in grades]
        _count(raw, taken_N, [f"grade {grade} of {BEST_GRADE}" for grade in grades], statistics)
        if relabel.action != "soft":
            _move(raw, taken_N, relabel, statistics)
    if relabel.action == "soft":
        raw["pos_scores"] = [float(BEST_GRADE)] * len(parse_group(raw).pos)
        raw["neg_scores"] = [float(grade) for grade in grades]


def _count(
    raw: dict[str, Any], taken_N: Sequence[bool], verdicts: Sequence[str], statistics: RelabelStatistics
) -> None:
    group = parse_group(raw)
    statistics.judged += len(taken_N)
    statistics.relabelled += sum(taken_N)
    statistics.rows += any(taken_N)
    if any(taken_N) and len(statistics.examples) < MAX_RELABELLED:
        first = taken_N.index(True)
        texts = {"query": group.query, "positive": group.pos[0], "negative": group.neg[first]}
        texts = {name: text[:MAX_TEXT] for name, text in texts.items()}
        statistics.examples.append({**texts, "verdict": verdicts[first]})


def _move(raw: dict[str, Any], taken_N: Sequence[bool], relabel: RelabelSpec, statistics: RelabelStatistics) -> None:
    """Drop or promote negatives, with their scores if the row has any."""
    if not any(taken_N):
        return
    statistics.rows_without_negatives += all(taken_N)
    group = parse_group(raw)
    parts = {"": (list(group.pos), list(group.neg))}
    if "neg_scores" in raw:
        parts["_scores"] = (list(raw["pos_scores"]), list(raw["neg_scores"]))
    for ending, (positives, negatives) in parts.items():
        moved = [value for value, taken in zip(negatives, taken_N, strict=True) if taken]
        if relabel.action == "promote":
            raw[f"pos{ending}"] = positives + moved
        raw[f"neg{ending}"] = [value for value, taken in zip(negatives, taken_N, strict=True) if not taken]
