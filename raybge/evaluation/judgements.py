"""What a search found, held against what is relevant: metrics of each query, and lines of a TREC run.

Letters in array names: Q queries, K ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raybge.cli.console import Console
from raybge.cli.options import EvaluateOptions
from raybge.data.groups import Group, parse_judged
from raybge.evaluation.metrics import CUTOFFS, area_under_curve, measure
from raybge.search.index import PassageLookup, SearchHits, ShardedIndex, search

if TYPE_CHECKING:
    from raybge.search.store import EncodedBlock


def relevant(group: Group) -> Sequence[str]:
    """A query's distinct answers."""
    return tuple(dict.fromkeys(group.pos))


@dataclass(frozen=True)
class Measured:
    """What one model reached: the metrics of the run, and the values of each query by metric, (Q,) in their order."""

    result: dict[str, Any]
    values: dict[str, np.ndarray] = field(default_factory=dict)


def search_and_measure(arguments: EvaluateOptions, index: ShardedIndex, pieces: list[EncodedBlock], console: Console) -> Measured:
    """Search for all queries, and write what was found where a run is asked for."""
    from raybge.util import atomic_write as output

    rows = sum(piece.rows for piece in pieces)
    cutoffs = [cutoff for cutoff in CUTOFFS if cutoff <= arguments.k]
    blocks: list[Judged] = []
    extra = cutoffs, index.lookup() if arguments.run_file else None
    with ExitStack() as stack:
        bar = stack.enter_context(console.bar("search", rows, "queries"))
        run = arguments.run_file and stack.enter_context(output.open_atomic(arguments.run_file, "--run_file"))
        for done in search(index, pieces, arguments.k, judged, *extra):
            if run:
                run.write(done.run)
            blocks.append(replace(done, run=b""))
            bar.update(len(done.absent_Q))
    values = {name: np.concatenate([block.values[name] for block in blocks]) for name in blocks[0].values}
    scores = [np.concatenate([block.scores[hit] for block in blocks]) for hit in (1, 0)]
    absent = sum(int(block.absent_Q.sum()) for block in blocks)
    if absent:
        console.info(f"{absent:,} answers are not in the corpus: they count as relevant and not found")
    metrics = {name: float(value_Q.mean(dtype=np.float64)) for name, value_Q in values.items()}
    return Measured({**metrics, f"AUC@{arguments.k}": area_under_curve(*scores)}, values)


@dataclass(frozen=True)
class Judged:
    """The queries of one block: each one's metrics, and how many of its answers the corpus lacks; the scores of what
    was found, of others and of relevant passages; lines of a TREC run.
    """

    values: dict[str, np.ndarray]
    absent_Q: np.ndarray
    scores: tuple[np.ndarray, np.ndarray]
    run: bytes


def judged(found: SearchHits, cutoffs: Sequence[int], lookup: PassageLookup | None) -> Judged:
    """Measure the queries of one encoded block; with `lookup`, also write what was found."""
    raws = [json.loads(text) for text in found.table["text"].to_pylist()]
    grades = [grades_of(parse_judged(raw)) for raw in raws]
    ends = np.cumsum([len(each) for each in grades])
    id_of = dict(zip(found.known.key_M.tolist(), found.known.id_M.tolist(), strict=True))
    relevant: list[dict[int, int]] = []
    absent: list[list[int]] = []
    for each, end in zip(grades, ends.tolist(), strict=True):
        ids = [id_of.get(key) for key in range(end - len(each), end)]
        pairs = [*zip(ids, each.values(), strict=True)]
        relevant.append({i: grade for i, grade in pairs if i is not None})
        absent.append([grade for i, grade in pairs if i is None])
    values = measure(found.ids_QK, relevant, absent, cutoffs)
    hits_QK = np.array(
        [[each.get(i, 0) > 0 for i in row] for each, row in zip(relevant, found.ids_QK.tolist(), strict=True)], bool
    )
    there_QK = found.ids_QK >= 0
    scores = found.scores_QK[there_QK & ~hits_QK], found.scores_QK[there_QK & hits_QK]
    lines = _run_lines(found, raws, lookup) if lookup else b""
    absent_Q = np.array([sum(grade > 0 for grade in each) for each in absent])
    return Judged({name: value.astype(np.float32) for name, value in values.items()}, absent_Q, scores, lines)


def grades_of(group: Group) -> dict[str, int]:
    """How relevant each distinct answer of a query is: its first grade, or 1."""
    found: dict[str, int] = {}
    for answer, grade in zip(group.pos, group.grades or [1] * len(group.pos), strict=True):
        found.setdefault(answer, grade)
    return found


def _run_lines(found: SearchHits, raws: Sequence[dict[str, Any]], lookup: PassageLookup) -> bytes:
    """Query, Q0, document, rank from 1, score, tag: as trec_eval reads it. What has no id goes by its place."""
    names = lookup.names(found.ids_QK[found.ids_QK >= 0])
    places = zip(found.table["file"].to_pylist(), found.table["offset"].to_pylist(), strict=True)
    lines = []
    for raw, (file, offset), ids, scores in zip(raws, places, found.ids_QK, found.scores_QK, strict=True):
        query = raw.get("_id", raw.get("id", f"{file}:{offset}"))
        for rank, (i, score) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True), start=1):
            if i >= 0:
                lines.append(f"{query} Q0 {names[i]} {rank} {score!r} raybge\n")
    return "".join(lines).encode()
