"""What evaluation while training found query by query, and the few queries of it that a report shows.

Letters in array names: Q queries, K ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raybge.evaluation.eval_data import ValidationConfig
from raybge.losses.objective import gather_counts, gather_rows
from raybge.report.page import cut

METRIC = "nDCG@10"  # what queries are compared by


@dataclass(frozen=True)
class Hit:
    """A passage that was retrieved."""

    text: str
    right: bool


@dataclass(frozen=True)
class Shown:
    """What a held-out query found before training and after it: the metric, the first passages, and the rank of the
    first answer counted from 1, None beyond the ranks that were looked at.
    """

    query: str
    answer: str
    before: float
    after: float
    hits_before: Sequence[Hit] = ()
    hits_after: Sequence[Hit] = ()
    rank_before: int | None = None
    rank_after: int | None = None


SHOWN = 20  # queries
HITS = 3  # passages of each, before and after


@dataclass(frozen=True)
class Retrieved:
    """What an evaluation found: each metric's values, (Q,), and the passages' ids, (Q, K), -1 for none. The same on
    every worker.
    """

    values: Mapping[str, np.ndarray]
    ids_QK: np.ndarray


def chosen(first: Retrieved, last: Retrieved) -> list[int]:
    """The queries that are shown, the largest changes first: as many gains as losses, where there are enough."""
    change_Q = last.values[METRIC] - first.values[METRIC]
    order = np.argsort(-np.abs(change_Q), kind="stable")
    gains, losses = ([int(q) for q in order if sign * change_Q[q] > 0] for sign in (1, -1))
    half = SHOWN // 2
    of_losses = min(len(losses), max(half, SHOWN - len(gains)))
    changed = {*gains[: SHOWN - of_losses], *losses[:of_losses]}
    rest = [int(q) for q in order if not change_Q[q]][: SHOWN - len(changed)]
    return [int(q) for q in order if int(q) in changed] + rest


def passages_of(found: Sequence[Retrieved], queries: Sequence[int]) -> np.ndarray:
    """The ids of the passages that are shown of these queries."""
    ids = np.unique(np.concatenate([each.ids_QK[queries, :HITS].ravel() for each in found]))
    return ids[ids >= 0]


def gather_texts(texts: Mapping[int, str], device: torch.device) -> dict[int, str]:
    """The texts of all workers by passage id, from the own ones. Collective."""
    packed = np.frombuffer(json.dumps(list(texts.items())).encode(), np.uint8).copy()
    counts = gather_counts([len(packed)], device)[0]
    everything = gather_rows(torch.from_numpy(packed).to(device), counts).cpu().numpy()
    parts = np.split(everything, np.cumsum(counts)[:-1])
    return {i: text for part in parts for i, text in json.loads(part.tobytes())}


def shown(
    config: ValidationConfig,
    first: Retrieved,
    last: Retrieved,
    queries: Sequence[int],
    answers: Sequence[np.ndarray],
    texts: Mapping[int, str],
) -> list[Shown]:
    """What the report says of these queries; `answers` are the passage ids of every query's answers. Their blocks are
    read again.
    """
    starts = np.cumsum([0, *config.queries.rows])
    blocks = {int(np.searchsorted(starts, q, side="right")) - 1 for q in queries}
    groups = {int(starts[block]) + row: group for block in blocks for row, group in enumerate(config.groups(block))}
    return [
        Shown(
            query=cut(groups[q].query),
            answer=cut(groups[q].pos[0]),
            before=float(first.values[METRIC][q]),
            after=float(last.values[METRIC][q]),
            hits_before=_hits(first.ids_QK[q], answers[q], texts),
            hits_after=_hits(last.ids_QK[q], answers[q], texts),
            rank_before=_rank(first.ids_QK[q], answers[q]),
            rank_after=_rank(last.ids_QK[q], answers[q]),
        )
        for q in queries
    ]


def _hits(ids_K: np.ndarray, answers: Iterable[int], texts: Mapping[int, str]) -> list[Hit]:
    return [Hit(texts.get(i, ""), i in answers) for i in ids_K[:HITS].tolist() if i >= 0]


def _rank(ids_K: np.ndarray, answers: np.ndarray) -> int | None:
    at = np.flatnonzero(np.isin(ids_K, answers[answers >= 0]))
    return int(at[0]) + 1 if len(at) else None
