"""Queries that the page of an evaluation shows: the worst ones, and those on which two models differ most.

Only a few numbers of each query are kept in memory; the texts of the selected queries and passages are read from the
store. Letters in array names: Q queries, K ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raybge.data.groups import parse_judged
from raybge.evaluation.metrics import METRICS
from raybge.evaluation.query_examples import HITS, PassageHit, QueryExample, select_queries
from raybge.report.text import excerpt
from raybge.search.store import EncodedBlock, Store
from raybge.util.errors import log_errors

WORST = 10  # queries


@dataclass(frozen=True)
class QueryRankings:
    """First ranks of each query.

    Args:
        top_QK: Passage ids of the first HITS ranks; -1 for an empty rank.
        relevant_QK: True where such a passage is relevant.
        rank_Q: Rank of the first relevant passage, counted from 1; 0 if none was retrieved.
        answer_Q: Id of the first relevant passage; -1 if the corpus lacks it.
    """

    top_QK: np.ndarray
    relevant_QK: np.ndarray
    rank_Q: np.ndarray
    answer_Q: np.ndarray

    @classmethod
    def of(cls, ids_QK: np.ndarray, relevant_QK: np.ndarray, relevant: Sequence[Mapping[int, int]]) -> QueryRankings:
        """Summarize full rankings; `relevant` has the grades of each query's passages in the corpus by id."""
        first = [next((i for i, grade in each.items() if grade > 0), -1) for each in relevant]
        rank_Q = np.where(relevant_QK.any(axis=1), relevant_QK.argmax(axis=1) + 1, 0)
        return cls(ids_QK[:, :HITS].copy(), relevant_QK[:, :HITS].copy(), rank_Q, np.array(first, np.int64))

    @classmethod
    def concatenate(cls, parts: Sequence[QueryRankings]) -> QueryRankings:
        """Join the rankings of consecutive queries."""
        names = ("top_QK", "relevant_QK", "rank_Q", "answer_Q")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class MeasuredModel:
    """A model's results for all queries.

    Args:
        values: Each query's value by metric.
        rankings: First ranks of each query.
        queries: Encoded queries, in the store.
        passages: Encoded passages, in the store.
    """

    values: Mapping[str, np.ndarray]
    rankings: QueryRankings
    queries: Sequence[EncodedBlock]
    passages: Sequence[EncodedBlock]


@dataclass(frozen=True)
class RankingExamples:
    """Examples of a page.

    Args:
        metric: Metric that they are selected by.
        worst: Queries with the lowest values of the first model.
        changed: Queries with the largest differences from the second model, if there is one.
    """

    metric: str
    worst: Sequence[QueryExample] = ()
    changed: Sequence[QueryExample] = ()


def ranking_examples(store: Store, models: Sequence[MeasuredModel]) -> RankingExamples | None:
    """Select and read the examples. An error is logged and ends there: the metrics are complete without them.

    Args:
        store: Store of the encoded blocks.
        models: The evaluated model and, if it is compared, another one.

    Returns:
        The examples; None if there is no metric or after an error.
    """
    first = models[0]
    metric = next((name for name in (*METRICS, *first.values) if name in first.values), None)
    if metric is None:
        return None
    examples = None
    with log_errors():
        worst = _examples(store, metric, _worst_queries(first, metric), models[:1])
        changed: list[QueryExample] = []
        if len(models) > 1:
            numbers = select_queries(models[1].values[metric], first.values[metric])
            changed = _examples(store, metric, numbers, models[:2])
        examples = RankingExamples(metric, worst, [each for each in changed if each.after != each.before])
    return examples


def _worst_queries(model: MeasuredModel, metric: str) -> list[int]:
    """Return the queries below 1 with the lowest values; among equal ones those whose answer ranks lowest first."""
    value_Q, rank_Q = model.values[metric], model.rankings.rank_Q
    depth_Q = np.where(rank_Q > 0, rank_Q, np.iinfo(np.int64).max)
    order = np.lexsort((-depth_Q, value_Q))[:WORST]
    return [int(q) for q in order if value_Q[q] < 1]


def _examples(store: Store, metric: str, queries: Sequence[int], models: Sequence[MeasuredModel]) -> list[QueryExample]:
    """Read the texts of the selected queries, and of the passages at the top of the models' rankings."""
    after, before = models[0], models[-1] if len(models) > 1 else None
    raws = {q: json.loads(text) for q, text in _texts(store, after.queries, np.array(queries, np.int64)).items()}
    ids = [after.rankings.answer_Q[list(queries)], *(each.rankings.top_QK[list(queries)].ravel() for each in models)]
    passage_ids = np.unique(np.concatenate(ids)) if queries else np.array([], np.int64)
    texts = _texts(store, after.passages, passage_ids[passage_ids >= 0])
    examples = []
    for q in queries:
        group = parse_judged(raws[q])
        answer = int(after.rankings.answer_Q[q])
        examples.append(
            QueryExample(
                query=excerpt(group.query),
                answer=excerpt(texts[answer] if answer >= 0 else group.pos[0]),
                before=float(before.values[metric][q]) if before else None,
                after=float(after.values[metric][q]),
                hits_before=_hits(before.rankings, q, texts) if before else (),
                hits_after=_hits(after.rankings, q, texts),
                rank_before=int(before.rankings.rank_Q[q]) or None if before else None,
                rank_after=int(after.rankings.rank_Q[q]) or None,
            )
        )
    return examples


def _hits(rankings: QueryRankings, query: int, texts: Mapping[int, str]) -> list[PassageHit]:
    pairs = zip(rankings.top_QK[query].tolist(), rankings.relevant_QK[query].tolist(), strict=True)
    return [PassageHit(excerpt(texts[i]), relevant) for i, relevant in pairs if i >= 0]


def _texts(store: Store, blocks: Sequence[EncodedBlock], numbers: np.ndarray) -> dict[int, str]:
    """Return the texts of rows by their number over all blocks."""
    ends = np.cumsum([block.rows for block in blocks])
    texts: dict[int, str] = {}
    block_N = np.searchsorted(ends, numbers, side="right")
    for number in np.unique(block_N).tolist():
        here = numbers[block_N == number]
        rows = here - (ends[number] - blocks[number].rows)
        texts.update(zip(here.tolist(), store.table(blocks[number].name)["text"].take(rows).to_pylist(), strict=True))
    return texts
