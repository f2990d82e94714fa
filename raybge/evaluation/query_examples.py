"""Per-query results of evaluation in training, and the selection of queries that the report shows.

This module imports no torch. Letters in array names: Q queries, K ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from raybge.evaluation.metrics import METRICS
from raybge.evaluation.validation_data import ValidationData
from raybge.report.text import excerpt

METRIC = METRICS[0]  # queries are compared by it
EXAMPLES = 20  # queries in the report
HITS = 3  # passages per ranking in the report


@dataclass(frozen=True)
class RetrievalResult:
    """Result of one evaluation, the same on every worker.

    Args:
        values: Each metric's values, (Q,), by name.
        ids_QK: Passage ids by rank; -1 for an empty rank.
    """

    values: Mapping[str, np.ndarray]
    ids_QK: np.ndarray

    def save(self, path: str | Path) -> None:
        """Write the result as a .npz file."""
        values: dict[str, Any] = dict(self.values)
        np.savez(path, ids_QK=self.ids_QK, **values)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of `save`."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls({name: arrays[name] for name in arrays.files if name != "ids_QK"}, arrays["ids_QK"])


@dataclass(frozen=True)
class PassageHit:
    """A retrieved passage's text, and whether it is relevant."""

    text: str
    relevant: bool


@dataclass(frozen=True)
class QueryExample:
    """A query's results before and after training, or of two models.

    Args:
        query: The query.
        answer: Its first relevant passage.
        before: The metric before training; None if a single model is shown.
        after: The metric after training.
        hits_before: The first passages retrieved before training.
        hits_after: The first passages retrieved after training.
        rank_before: Rank of the first relevant passage before training, counted from 1; None if it was not retrieved.
        rank_after: The same after training.
    """

    query: str
    answer: str
    before: float | None
    after: float
    hits_before: Sequence[PassageHit] = ()
    hits_after: Sequence[PassageHit] = ()
    rank_before: int | None = None
    rank_after: int | None = None


def select_queries(before_Q: np.ndarray, after_Q: np.ndarray) -> list[int]:
    """Select EXAMPLES queries, the largest changes of a metric first: half gains, half losses, if there are enough."""
    change_Q = after_Q - before_Q
    order = np.argsort(-np.abs(change_Q), kind="stable")
    gains, losses = ([int(q) for q in order if sign * change_Q[q] > 0] for sign in (1, -1))
    half = EXAMPLES // 2
    loss_count = min(len(losses), max(half, EXAMPLES - len(gains)))
    changed = {*gains[: EXAMPLES - loss_count], *losses[:loss_count]}
    unchanged = [int(q) for q in order if not change_Q[q]][: EXAMPLES - len(changed)]
    return [int(q) for q in order if int(q) in changed] + unchanged


def hit_ids(results: Sequence[RetrievalResult], queries: Sequence[int]) -> np.ndarray:
    """Return the distinct ids of the passages that the report shows for these queries."""
    ids = np.unique(np.concatenate([each.ids_QK[queries, :HITS].ravel() for each in results]))
    return ids[ids >= 0]


def build_examples(
    data: ValidationData,
    first: RetrievalResult,
    last: RetrievalResult,
    queries: Sequence[int],
    answers: Sequence[np.ndarray],
    texts: Mapping[int, str],
) -> list[QueryExample]:
    """Build the examples of the selected queries, whose blocks are read again.

    Args:
        data: The validation data.
        first: Result before training.
        last: Result after training.
        queries: Numbers of the selected queries.
        answers: Passage ids of every query's relevant passages.
        texts: Texts of the retrieved passages by id.

    Returns:
        One example per selected query, in the same order.
    """
    starts = np.cumsum([0, *data.queries.rows])
    blocks = {int(np.searchsorted(starts, q, side="right")) - 1 for q in queries}
    groups = {int(starts[block]) + row: group for block in blocks for row, group in enumerate(data.groups(block))}
    return [
        QueryExample(
            query=excerpt(groups[q].query),
            answer=excerpt(groups[q].pos[0]),
            before=float(first.values[METRIC][q]),
            after=float(last.values[METRIC][q]),
            hits_before=_hits(first.ids_QK[q], answers[q], texts),
            hits_after=_hits(last.ids_QK[q], answers[q], texts),
            rank_before=_first_rank(first.ids_QK[q], answers[q]),
            rank_after=_first_rank(last.ids_QK[q], answers[q]),
        )
        for q in queries
    ]


def _hits(ids_K: np.ndarray, answers: Iterable[int], texts: Mapping[int, str]) -> list[PassageHit]:
    return [PassageHit(texts.get(i, ""), i in answers) for i in ids_K[:HITS].tolist() if i >= 0]


def _first_rank(ids_K: np.ndarray, answers: np.ndarray) -> int | None:
    ranks = np.flatnonzero(np.isin(ids_K, answers[answers >= 0]))
    return int(ranks[0]) + 1 if len(ranks) else None
