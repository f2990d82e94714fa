"""Measure retrieval: exact search over a corpus, then nDCG, MRR, Recall and MAP at 1, 10 and 100.

    python -m raybge.evaluate --encoder runs/mine --corpus_data corpus.jsonl --query_data dev.jsonl --k 100
    python -m raybge.evaluate --help

From Python: `raybge.evaluate_retrieval(encoder=..., corpus_data=..., query_data=...)`.

Letters in array names: Q queries, K ranks, N relevant passages of all queries.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raybge import cli
from raybge.arguments import EvaluateArguments
from raybge.screen import Screen

if TYPE_CHECKING:
    from raybge.data.groups import Group
    from raybge.search.index import Found, Index
    from raybge.search.inputs import Source
    from raybge.search.pipeline import Piece

INSTRUCTION = "Represent this sentence for searching relevant passages: "
QUERY_LENGTH, PASSAGE_LENGTH = 32, 128  # the recipe's, where the model's folder does not say


def evaluate_retrieval(**flags: Any) -> dict[str, float]:
    """Measure retrieval; the arguments are the command's flags. Returns the metrics by name, e.g. "nDCG@10".

    Raises UserError, before any model loads, for flags, files or rows that cannot be used.
    """
    return cli.call(EvaluateArguments, evaluate, "evaluate", flags)


def evaluate(arguments: EvaluateArguments, screen: Screen) -> dict[str, float]:
    """The command: check, read, plan, encode, search, measure, sum up."""
    from raybge.cluster import plan_workers
    from raybge.data.groups import parse_judged, parse_passage
    from raybge.search.duplicates import deduplicate
    from raybge.search.index import hold, say_recall
    from raybge.search.inputs import (
        Stages,
        check_search,
        describe_data,
        describe_memory,
        describe_model,
        embedder_of,
        opened,
        shards_held,
        work_folder,
    )
    from raybge.search.pipeline import Passages, Queries, encode, passage_itself
    from raybge.search.shards import Kind
    from raybge.search.store import Store

    _check(arguments)
    sources = _sources(arguments)
    options = _encoder_options(arguments)
    model = describe_model(options)
    stages = Stages()
    kind = Kind(arguments.index_factory, arguments.use_gpu_for_searching)
    with (
        work_folder(arguments.storage_path, "evaluate") as work,
        opened(arguments, sources, work, screen) as (cluster, surveys),
    ):
        store = Store(work)
        corpus = Passages(surveys[0], parse_passage, passage_itself)
        queries = Queries(surveys[1], parse_judged, relevant)
        check_search(arguments.use_gpu_for_searching, cluster, arguments.k, "k")
        plan = plan_workers(
            cluster, arguments.num_workers, arguments.use_gpu, arguments.cpus_per_worker, cores_a_worker=1
        )
        with stages("deduplicate"):
            kept = deduplicate(corpus.survey, corpus.parse, corpus.texts, store)
        stages.count("deduplicate", int(kept.found_B.sum()), "passages")
        embedder = embedder_of(options, plan)
        size, dim = min(arguments.shard_size, kept.passages), embedder.dim
        held = shards_held(cluster, plan, kind, size, dim, arguments.shards_per_actor)
        screen.say(f"cluster: {cluster.describe()}; {plan.describe('actor')}")
        screen.say(model)
        screen.say(describe_data(queries, corpus, kept, arguments.shard_size))
        screen.say(describe_memory(kept, queries, size, held, plan.workers, dim, arguments.k))
        counts = {"queries": queries.survey.total_rows, "corpus": kept.passages}
        if arguments.dry_run:
            return {**counts}
        with stages("encode"):
            passages, rows = encode(corpus, kept, queries, embedder, store, plan, screen)
        stages.count("encode", kept.passages + queries.survey.total_rows, "texts")
        with stages("index"):
            index = hold(passages, store, arguments.shard_size, plan, kind, held)
        with index, stages("search"):
            metrics = _search_and_measure(arguments, index, rows, screen)
            say_recall(index, rows, arguments.k, arguments.search_batch_size, screen)
        stages.count("search", queries.survey.total_rows, "queries")
    stages.say(screen)
    result = {**metrics, **counts}
    _report(arguments, result, screen)
    return result


# --- check ------------------------------------------------------------------------------------------------


def _check(arguments: EvaluateArguments) -> None:
    from raybge import output
    from raybge.model.folder import check_model_folder, vector_width
    from raybge.search.inputs import check_numbers
    from raybge.search.shards import check_factory, check_gpu_search

    if arguments.use_gpu_for_searching:
        check_gpu_search()
    check_numbers(
        arguments,
        "k",
        "search_batch_size",
        "shard_size",
        "shards_per_actor",
        "batch_size",
        "max_query_length",
        "max_passage_length",
    )
    check_model_folder(arguments.encoder, "--encoder")
    check_factory(arguments.index_factory, vector_width(arguments.encoder, arguments.cache_dir))
    if arguments.metrics_file:
        output.exists(arguments.metrics_file, "--metrics_file")


def _sources(arguments: EvaluateArguments) -> list[Source]:
    from raybge.data.files import list_files
    from raybge.data.groups import parse_judged, parse_passage
    from raybge.search.inputs import Source, check_apart

    sources = [
        Source(list_files(arguments.corpus_data, "--corpus_data"), "--corpus_data", parse_passage),
        Source(list_files(arguments.query_data, "--query_data"), "--query_data", parse_judged),
    ]
    if arguments.metrics_file:
        check_apart(arguments.metrics_file, "--metrics_file", sources)
    return sources


def _encoder_options(arguments: EvaluateArguments) -> dict[str, Any]:
    from raybge.model.folder import read_settings

    name = arguments.encoder
    folder_length = read_settings(name, arguments.cache_dir).max_length
    return {
        "model_name_or_path": os.path.abspath(name) if os.path.exists(name) else name,
        "normalize_embeddings": arguments.normalize_embeddings,
        "use_fp16": arguments.fp16,
        "query_instruction_for_retrieval": INSTRUCTION if arguments.add_instruction else None,
        "pooling_method": arguments.pooling_method,
        "trust_remote_code": arguments.trust_remote_code,
        "cache_dir": arguments.cache_dir,
        "batch_size": arguments.batch_size,
        "query_max_length": arguments.max_query_length or folder_length or QUERY_LENGTH,
        "passage_max_length": arguments.max_passage_length or folder_length or PASSAGE_LENGTH,
    }


# --- search, measure, report ------------------------------------------------------------------------------


def relevant(group: Group) -> Sequence[str]:
    """A query's distinct answers."""
    return tuple(dict.fromkeys(group.pos))


def _search_and_measure(
    arguments: EvaluateArguments, index: Index, pieces: list[Piece], screen: Screen
) -> dict[str, float]:
    from raybge.metrics import CUTOFFS
    from raybge.search.index import search

    rows = sum(piece.rows for piece in pieces)
    cutoffs = [cutoff for cutoff in CUTOFFS if cutoff <= arguments.k]
    sums: Counter[str] = Counter()
    absent = 0
    with screen.bar("search", rows, "queries") as bar:
        for done in search(index, pieces, arguments.k, arguments.search_batch_size, judged, cutoffs):
            sums.update(done.sums)
            absent += done.absent
            bar.update(done.rows)
    if absent:
        screen.say(f"{absent:,} answers are not in the corpus: they count as relevant and not found")
    return {name: total / rows for name, total in sums.items()}


@dataclass(frozen=True)
class Judged:
    """Sums of each metric over the queries of one block, and how many of their answers the corpus lacks."""

    sums: dict[str, float]
    rows: int
    absent: int


def judged(found: Found, cutoffs: Sequence[int]) -> Judged:
    """Measure the queries of one encoded block."""
    import numpy as np

    from raybge.metrics import measure
    from raybge.search.shards import keys_of

    _, counts = keys_of(found.table)
    ends = np.cumsum(counts)
    edges = np.searchsorted(found.known.key_M, ends[:-1])
    answers = [ids.tolist() for ids in np.split(found.known.id_M, edges)]
    absent = [int(count) - len(ids) for count, ids in zip(counts, answers, strict=True)]
    values = measure(found.ids_QK, answers, absent, cutoffs)
    return Judged({name: float(value.sum()) for name, value in values.items()}, len(counts), sum(absent))


def _report(arguments: EvaluateArguments, result: dict[str, float], screen: Screen) -> None:
    import json

    from raybge import output
    from raybge.metrics import CUTOFFS

    kinds = list(dict.fromkeys(name.split("@")[0] for name in result if "@" in name))
    cutoffs = [cutoff for cutoff in CUTOFFS if cutoff <= arguments.k]
    rows = [(kind, *(f"{result[f'{kind}@{cutoff}']:.4f}" for cutoff in cutoffs)) for kind in kinds]
    screen.table(("", *(f"@{cutoff}" for cutoff in cutoffs)), rows)
    if arguments.metrics_file:
        with output.written_aside(arguments.metrics_file, "--metrics_file") as out:
            out.write((json.dumps(result, indent=2) + "\n").encode())
        screen.say(f"written: {arguments.metrics_file}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(EvaluateArguments, evaluate, "evaluate", argv)


if __name__ == "__main__":
    raise SystemExit(main())
