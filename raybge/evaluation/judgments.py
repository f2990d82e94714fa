"""Relevance judgments: queries joined with theirs, and search results measured against them.

Letters in array names: Q queries, K ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from raybge.cli.console import Console
from raybge.data.groups import Group, parse_judged
from raybge.data.qrels import join, parse_query, read_qrels
from raybge.data.source_files import list_files
from raybge.evaluation.metrics import CUTOFFS, area_under_curve, measure
from raybge.evaluation.ranking_examples import MeasuredModel, QueryRankings
from raybge.evaluation.spec import RetrievalFiles
from raybge.search.index import PassageLookup, SearchHits, ShardedIndex, search
from raybge.search.inputs import InputFiles, survey_input
from raybge.search.store import EncodedBlock
from raybge.util.atomic_write import open_atomic
from raybge.util.errors import UserError
from raybge.util.filesystem import append_to_path


def relevant_texts(group: Group) -> Sequence[str]:
    """Return a query's distinct relevant passages, or their document ids."""
    return tuple(dict.fromkeys(group.pos))


def write_judged_queries(files: RetrievalFiles, queries: InputFiles, work: str, console: Console) -> InputFiles:
    """Join the queries with their relevance judgments into a file of the work folder.

    Args:
        files: the evaluation's files, with qrels.
        queries: the queries without judgments.
        work: the work folder.
        console: prints the number of skipped queries.

    Returns:
        The joined queries.

    Raises:
        UserError: a file or row that cannot be used, or judged queries that do not exist with --on_bad_rows stop.
    """
    assert files.qrels
    grades = read_qrels(files.qrels, "--qrels")
    survey = survey_input(replace(queries, parse=parse_query), work, files.on_bad_rows, console)
    path = append_to_path(work, "/judged.jsonl")
    joined = join(survey, grades, path)
    if joined.unjudged:
        console.info(f"--query_data: {joined.unjudged:,} queries without a relevant document are skipped")
    if joined.unknown:
        examples = ", ".join(joined.unknown[:3]) + (", ..." if len(joined.unknown) > 3 else "")
        message = f"--qrels: {len(joined.unknown):,} judged queries are not in --query_data ({examples})"
        if files.on_bad_rows == "stop":
            raise UserError(f"{message}; add --on_bad_rows skip to leave them out")
        console.info(f"{message}: skipped")
    # The queries have been checked, and document ids are no texts.
    return InputFiles(list_files(path, "--query_data", any_text=True), "--query_data", parse_judged)


# --- measure ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelMetrics:
    """Metrics of one model.

    Args:
        summary: means by name, and counts.
        values: each query's values by metric, (Q,) in the order of the queries.
        measured: what examples are selected and read from; None if nothing was measured.
    """

    summary: dict[str, Any]
    values: dict[str, np.ndarray] = field(default_factory=dict)
    measured: MeasuredModel | None = None


def search_and_measure(
    index: ShardedIndex, blocks: Sequence[EncodedBlock], k: int, run_file: str | None, console: Console
) -> ModelMetrics:
    """Search for all queries and measure the results.

    Args:
        index: the corpus.
        blocks: the encoded queries.
        k: number of passages per query.
        run_file: TREC run file to write; None for none.
        console: shows the progress.

    Returns:
        The metrics.
    """
    cutoffs = [cutoff for cutoff in CUTOFFS if cutoff <= k]
    results: list[BlockMetrics] = []
    with ExitStack() as stack:
        bar = stack.enter_context(console.bar("search", sum(block.rows for block in blocks), "queries"))
        run = stack.enter_context(open_atomic(run_file, "--run_file")) if run_file else None
        for result in search(index, blocks, k, measure_block, cutoffs, index.lookup() if run_file else None):
            if run:
                run.write(result.run_lines)
            results.append(replace(result, run_lines=b""))
            bar.update(len(result.absent_Q))
    absent = sum(int(result.absent_Q.sum()) for result in results)
    if absent:
        console.info(f"{absent:,} relevant passages are not in the corpus: they count as relevant and not retrieved")
    values = {name: np.concatenate([each.values[name] for each in results]) for name in results[0].values}
    relevant_R = np.concatenate([each.relevant_scores for each in results])
    other_O = np.concatenate([each.other_scores for each in results])
    means = {name: float(value_Q.mean(dtype=np.float64)) for name, value_Q in values.items()}
    rankings = QueryRankings.concatenate([result.rankings for result in results])
    measured = MeasuredModel(values, rankings, blocks, index.blocks)
    return ModelMetrics({**means, f"AUC@{k}": area_under_curve(relevant_R, other_O)}, values, measured)


@dataclass(frozen=True)
class BlockMetrics:
    """Metrics of the queries of one block.

    Args:
        values: each query's values by metric, (Q,) float32.
        absent_Q: number of each query's relevant passages that the corpus lacks.
        relevant_scores: scores of the retrieved relevant passages.
        other_scores: scores of the other retrieved passages.
        run_lines: lines of a TREC run.
        rankings: first ranks of each query.
    """

    values: dict[str, np.ndarray]
    absent_Q: np.ndarray
    relevant_scores: np.ndarray
    other_scores: np.ndarray
    run_lines: bytes
    rankings: QueryRankings


def measure_block(hits: SearchHits, cutoffs: Sequence[int], lookup: PassageLookup | None) -> BlockMetrics:
    """Measure the queries of one encoded block; runs in a Ray task.

    Args:
        hits: the search results.
        cutoffs: ranks at which to measure.
        lookup: access to document ids, to write lines of a TREC run; None writes none.

    Returns:
        The metrics.
    """
    raws = [json.loads(text) for text in hits.table["text"].to_pylist()]
    grades = [answer_grades(parse_judged(raw)) for raw in raws]
    ends = np.cumsum([len(each) for each in grades])
    id_of = dict(zip(hits.known.key_M.tolist(), hits.known.id_M.tolist(), strict=True))
    relevant: list[dict[int, int]] = []
    absent: list[list[int]] = []
    for each, end in zip(grades, ends.tolist(), strict=True):
        ids = [id_of.get(key) for key in range(end - len(each), end)]
        pairs = [*zip(ids, each.values(), strict=True)]
        relevant.append({i: grade for i, grade in pairs if i is not None})
        absent.append([grade for i, grade in pairs if i is None])
    values = measure(hits.ids_QK, relevant, absent, cutoffs)
    relevant_QK = np.array(
        [[each.get(i, 0) > 0 for i in row] for each, row in zip(relevant, hits.ids_QK.tolist(), strict=True)], bool
    )
    retrieved_QK = hits.ids_QK >= 0
    return BlockMetrics(
        values={name: value.astype(np.float32) for name, value in values.items()},
        absent_Q=np.array([sum(grade > 0 for grade in each) for each in absent]),
        relevant_scores=hits.scores_QK[retrieved_QK & relevant_QK],
        other_scores=hits.scores_QK[retrieved_QK & ~relevant_QK],
        run_lines=_run_lines(hits, raws, lookup) if lookup else b"",
        rankings=QueryRankings.of(hits.ids_QK, relevant_QK, relevant),
    )


def answer_grades(group: Group) -> dict[str, int]:
    """Return the grade of each distinct relevant passage of a query: its first grade, or 1."""
    grades: dict[str, int] = {}
    for answer, grade in zip(group.pos, group.grades or [1] * len(group.pos), strict=True):
        grades.setdefault(answer, grade)
    return grades


def _run_lines(hits: SearchHits, raws: Sequence[dict[str, Any]], lookup: PassageLookup) -> bytes:
    """Return the lines «query Q0 document rank score tag» of a TREC run; a query without an id is named by position."""
    names = lookup.names(hits.ids_QK[hits.ids_QK >= 0])
    positions = zip(hits.table["file"].to_pylist(), hits.table["offset"].to_pylist(), strict=True)
    lines = []
    for raw, (file, offset), ids, scores in zip(raws, positions, hits.ids_QK, hits.scores_QK, strict=True):
        query = raw.get("_id", raw.get("id", f"{file}:{offset}"))
        for rank, (i, score) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True), start=1):
            if i >= 0:
                lines.append(f"{query} Q0 {names[i]} {rank} {score!r} raybge\n")
    return "".join(lines).encode()
