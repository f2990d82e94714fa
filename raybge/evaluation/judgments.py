"""Relevance judgments: queries joined with theirs, and search results measured against them.

Letters in array names: Q queries, K ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from raybge.cli.console import Console
from raybge.data.groups import Group, parse_judged
from raybge.data.qrels import join, parse_answered, parse_query, read_qrels
from raybge.data.source_files import list_files
from raybge.evaluation.metrics import CUTOFFS, area_under_curve, measure
from raybge.evaluation.ranking_examples import MeasuredModel, QueryRankings
from raybge.evaluation.spec import Ranking, RetrievalFiles
from raybge.evaluation.trec_run import FIELDS, run_lines
from raybge.search import topk
from raybge.search.id_conflicts import report_id_conflicts
from raybge.search.index import PassageLookup, SearchHits, ShardedIndex, search
from raybge.search.inputs import InputFiles, survey_input
from raybge.search.store import EncodedBlock
from raybge.util.atomic_write import open_atomic
from raybge.util.errors import UserError
from raybge.util.filesystem import append_to_path
from raybge.util.plural import plural


def known_texts(group: Group) -> Sequence[str]:
    """Return a query's distinct relevant passages, or their document ids, and last the query itself, or its id."""
    return (*dict.fromkeys(group.pos), group.query)


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
        UserError: a file or row that cannot be used, or, with --on_bad_rows stop, judged queries that do not exist or
            that exist twice.
    """
    assert files.qrels
    grades = read_qrels(files.qrels, "--qrels")
    survey = survey_input(replace(queries, parse=parse_query), work, files.on_bad_rows, console)
    path = append_to_path(work, "/judged.jsonl")
    joined = join(survey, grades, path)
    if joined.unjudged:
        console.info(f"--query_data: {joined.unjudged:,} queries without a relevant document are skipped")
    report_id_conflicts(joined.repeated, joined.repeated_count, "--query_data", files.on_bad_rows, console)
    if joined.unknown:
        examples = ", ".join(joined.unknown[:3]) + (", ..." if len(joined.unknown) > 3 else "")
        message = f"--qrels: {len(joined.unknown):,} judged queries are not in --query_data ({examples})"
        if files.on_bad_rows == "stop":
            raise UserError(f"{message}; add --on_bad_rows skip to leave them out")
        console.info(f"{message}: skipped")
    # The queries have been checked, and document ids are no texts.
    return InputFiles(list_files(path, "--query_data", any_text=True), "--query_data", parse_answered)


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

    @property
    def means(self) -> dict[str, float]:
        """The summary without its counts."""
        return {name: value for name, value in self.summary.items() if "@" in name}


def search_and_measure(
    index: ShardedIndex, blocks: Sequence[EncodedBlock], ranking: Ranking, run_file: str | None, console: Console
) -> ModelMetrics:
    """Search for all queries and measure the results.

    Args:
        index: the corpus.
        blocks: the encoded queries.
        ranking: ranks to measure.
        run_file: TREC run file to write; None for none.
        console: shows the progress and the numbers of special hits.

    Returns:
        The metrics.
    """
    results: list[BlockMetrics] = []
    with ExitStack() as stack:
        bar = stack.enter_context(
            console.bar("search", sum(block.rows for block in blocks), "query", start_up="loading the index")
        )
        run = stack.enter_context(open_atomic(run_file, "--run_file")) if run_file else None
        measuring = (ranking, bool(run_file), index.lookup())
        for result in search(index, blocks, ranking.depth, measure_block, *measuring):
            if run:
                run.write(result.run_lines)
            results.append(replace(result, run_lines=b""))
            bar.update(len(result.absent_Q))
    values = {name: np.concatenate([each.values[name] for each in results]) for name in results[0].values}
    relevant_R = np.concatenate([each.relevant_scores for each in results])
    other_O = np.concatenate([each.other_scores for each in results])
    means = {name: float(value_Q.mean()) for name, value_Q in values.items()}
    means[f"AUC@{ranking.k}"] = area_under_curve(relevant_R, other_O)
    rankings = QueryRankings.concatenate([result.rankings for result in results])
    measured = MeasuredModel(values, rankings, blocks, index.blocks)
    return ModelMetrics({**means, **_report_hits(results, ranking, console)}, values, measured)


def _report_hits(results: Sequence[BlockMetrics], ranking: Ranking, console: Console) -> dict[str, int]:
    """Print the numbers of absent passages and of dropped hits, and return those that belong to the metrics."""
    if absent := sum(int(result.absent_Q.sum()) for result in results):
        console.info(f"{absent:,} relevant passages are not in the corpus: they count as relevant and not retrieved")
    queries = Counter(str(name) for result in results for name in result.run_queries)
    if repeated := sum(count > 1 for count in queries.values()):
        console.info(
            f"--run_file: {plural(repeated, 'id')} of several queries each, which trec_eval takes for one query"
        )
    if unreadable := sum(result.unreadable_lines for result in results):
        console.info(f"--run_file: {plural(unreadable, 'line')} with white space in an id, which trec_eval cannot read")
    if not ranking.drop_self_hits:
        return {}
    dropped, relevant, differing = np.sum([result.self_hits for result in results], axis=0).tolist()
    title = f"--drop_self_hits: {dropped:,} hits that are the query itself are dropped"
    console.info(f"{title}, {relevant:,} of them judged relevant")
    if differing:
        console.info(
            f"--drop_self_hits: {differing:,} of them have another text than the query: if documents and queries have "
            "equal ids by chance, add --drop_self_hits False"
        )
    return {
        "dropped_self_hits": dropped,
        "dropped_relevant_self_hits": relevant,
        "dropped_self_hits_with_other_text": differing,
    }


@dataclass(frozen=True)
class BlockMetrics:
    """Metrics of the queries of one block.

    Args:
        values: each query's values by metric, (Q,) float64.
        absent_Q: number of each query's relevant passages that the corpus lacks.
        relevant_scores: scores of the retrieved relevant passages.
        other_scores: scores of the other retrieved passages.
        self_hits: number of dropped hits, of those judged relevant, and of those with another text than the query.
        run_lines: lines of a TREC run.
        rankings: first ranks of each query.
        run_queries: names of the queries in these lines.
        unreadable_lines: number of these lines whose fields trec_eval cannot read.
    """

    values: dict[str, np.ndarray]
    absent_Q: np.ndarray
    relevant_scores: np.ndarray
    other_scores: np.ndarray
    rankings: QueryRankings
    self_hits: tuple[int, int, int] = (0, 0, 0)
    run_lines: bytes = b""
    run_queries: Sequence[object] = ()
    unreadable_lines: int = 0


def measure_block(hits: SearchHits, ranking: Ranking, writes_run: bool, lookup: PassageLookup) -> BlockMetrics:
    """Measure the queries of one encoded block; runs in a Ray task.

    Args:
        hits: the search results, to the depth of `ranking`.
        ranking: ranks to measure.
        writes_run: also make lines of a TREC run.
        lookup: access to texts and ids of documents.

    Returns:
        The metrics.
    """
    raws = [json.loads(text) for text in hits.table["text"].to_pylist()]
    grades = [answer_grades(parse_judged(raw)) for raw in raws]
    ends = np.cumsum([len(each) + 1 for each in grades])  # the last key is the query's own: see `known_texts`
    id_of = dict(zip(hits.known.key_M.tolist(), hits.known.id_M.tolist(), strict=True))
    relevant: list[dict[int, int]] = []
    absent: list[list[int]] = []
    for each, end in zip(grades, ends.tolist(), strict=True):
        ids = [id_of.get(key) for key in range(end - 1 - len(each), end - 1)]
        pairs = [*zip(ids, each.values(), strict=True)]
        relevant.append({i: grade for i, grade in pairs if i is not None})
        absent.append([grade for i, grade in pairs if i is None])
    self_hits = (0, 0, 0)
    if ranking.drop_self_hits:
        self_Q = np.array([id_of.get(end - 1, _NO_SELF) for end in ends.tolist()])
        self_hits = _count_self_hits(hits.ids_QK[:, : ranking.k], self_Q, relevant, raws, lookup)
        hits = _without(hits, self_Q, ranking.k)
    cutoffs = [cutoff for cutoff in CUTOFFS if cutoff <= ranking.k]
    relevant_QK = np.array(
        [[each.get(i, 0) > 0 for i in row] for each, row in zip(relevant, hits.ids_QK.tolist(), strict=True)], bool
    )
    retrieved_QK = hits.ids_QK >= 0
    queries = _query_names(hits, raws) if writes_run else []
    lines = b""
    if writes_run:
        names = lookup.names(hits.ids_QK[hits.ids_QK >= 0])
        lines = run_lines(queries, hits.ids_QK, hits.scores_QK, names)
    return BlockMetrics(
        values=measure(hits.ids_QK, relevant, absent, cutoffs),
        absent_Q=np.array([sum(grade > 0 for grade in each) for each in absent]),
        relevant_scores=hits.scores_QK[retrieved_QK & relevant_QK],
        other_scores=hits.scores_QK[retrieved_QK & ~relevant_QK],
        rankings=QueryRankings.of(hits.ids_QK, relevant_QK, relevant),
        self_hits=self_hits,
        run_lines=lines,
        run_queries=queries,
        unreadable_lines=sum(len(line.split()) != FIELDS for line in lines.splitlines()),
    )


def answer_grades(group: Group) -> dict[str, int]:
    """Return the grade of each distinct relevant passage of a query: its first grade, or 1."""
    grades: dict[str, int] = {}
    for answer, grade in zip(group.pos, group.grades or [1] * len(group.pos), strict=True):
        grades.setdefault(answer, grade)
    return grades


def _query_names(hits: SearchHits, raws: Sequence[dict[str, Any]]) -> list[object]:
    """Return the names of the queries in a TREC run: their ids, or the positions of those without one."""
    positions = zip(hits.table["file"].to_pylist(), hits.table["offset"].to_pylist(), strict=True)
    ids = (raw.get("_id", raw.get("id")) for raw in raws)
    return [f"{file}:{offset}" if i is None else i for i, (file, offset) in zip(ids, positions, strict=True)]


# --- hits that are the query itself -----------------------------------------------------------------------------------

_NO_SELF = -2  # passage id for a query that is not in the corpus


def _without(hits: SearchHits, self_Q: np.ndarray, k: int) -> SearchHits:
    """Return the first k hits of each query besides the passage of `self_Q`."""
    is_self_QK = hits.ids_QK == self_Q[:, None]
    ids_QK = np.where(is_self_QK, topk.NO_ID, hits.ids_QK)
    scores_QK = np.where(is_self_QK, np.float32(-np.inf), hits.scores_QK)
    order_QK = np.argsort(is_self_QK, axis=1, kind="stable")[:, :k]
    ids_QK, scores_QK = (np.take_along_axis(each, order_QK, axis=1) for each in (ids_QK, scores_QK))
    return replace(hits, ids_QK=ids_QK, scores_QK=scores_QK)


def _count_self_hits(
    ids_QK: np.ndarray,
    self_Q: np.ndarray,
    relevant: Sequence[Mapping[int, int]],
    raws: Sequence[dict[str, Any]],
    lookup: PassageLookup,
) -> tuple[int, int, int]:
    """Return the number of hits that are the query itself, of those judged relevant, of those with another text."""
    rows = np.flatnonzero((ids_QK == self_Q[:, None]).any(axis=1)).tolist()
    if not rows:
        return 0, 0, 0
    texts = lookup.texts(self_Q[rows])
    judged = sum(relevant[row].get(int(self_Q[row]), 0) > 0 for row in rows)
    differing = sum(not _same_text(raws[row]["query"], texts[int(self_Q[row])]) for row in rows)
    return len(rows), judged, differing


def _same_text(query: str, document: str) -> bool:
    """Return True if the query is the document, its title or its body."""
    query, document = (" ".join(text.casefold().split()) for text in (query, document))
    return document == query or document.startswith(f"{query} ") or document.endswith(f" {query}")
