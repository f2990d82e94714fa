"""Measure retrieval: exact search over a corpus, then nDCG, MRR, Recall and MAP at 1, 10 and 100.

    python -m raybge.evaluate --encoder runs/mine --corpus_data corpus.jsonl --query_data dev.jsonl --k 100
    python -m raybge.evaluate --help

From Python: `raybge.evaluate_retrieval(model_name_or_path=..., corpus_data=..., query_data=...)`.

Letters in array names: Q queries, K ranks, N relevant passages of all queries.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from raybge.cli.console import Console
from raybge.cli.options import EvaluateOptions
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.cluster.resources import Cluster
    from raybge.data.survey import Survey
    from raybge.evaluation.judgements import Measured
    from raybge.search.deduplication import Kept
    from raybge.search.pipeline import Passages, Queries
    from raybge.search.session import Source, Stages
    from raybge.search.store import Store

INSTRUCTION = "Represent this sentence for searching relevant passages: "
MAIN = ("nDCG@10", "MRR@10", "Recall@100")  # of a comparison, on the console
QUERY_LENGTH, PASSAGE_LENGTH = 32, 128  # the recipe's, where the model's folder does not say


def evaluate(arguments: EvaluateOptions, console: Console) -> dict[str, Any]:
    """The command: check, read, plan, encode, search, measure, sum up."""
    if arguments.mteb_tasks:
        from raybge.evaluation.mteb import evaluate_tasks

        _check(arguments)
        return evaluate_tasks(arguments, _encoder_options(arguments), console)
    arguments = _resolved(arguments)
    with judged_data(arguments, console) as (data, cluster):
        models = [arguments.model_name_or_path, *(arguments.compare or [])]
        found = [measured(replace(arguments, model_name_or_path=model), data, cluster, console) for model in models]
    if arguments.dry_run:
        return dict(data.counts)
    _report(arguments, data, found, console)
    return found[0].result


@contextmanager
def judged_data(arguments: EvaluateOptions, console: Console) -> Iterator[tuple[Data, Cluster]]:
    """Check the flags and read corpus and queries: what models can be `measured` on while the block runs."""
    from raybge.search.session import opened, work_folder
    from raybge.search.store import Store

    _check(arguments)
    with work_folder(arguments.storage_path, "evaluate") as work:
        sources = _sources(arguments, work, console)
        with opened(arguments, sources, work, console) as (cluster, surveys):
            yield Data.of(arguments, surveys, Store(work)), cluster


@dataclass(frozen=True)
class Data:
    """Corpus and queries, the same for all models that are compared."""

    corpus: Passages
    queries: Queries
    kept: Kept
    store: Store
    stages: Stages

    @classmethod
    def of(cls, arguments: EvaluateOptions, surveys: Sequence[Survey], store: Store) -> Data:
        """By the documents' ids where they are judged by these, else by their texts."""
        from raybge.data.groups import id_key, parse_document, parse_judged, parse_passage, text_key
        from raybge.evaluation.judgements import relevant
        from raybge.search.deduplication import deduplicate
        from raybge.search.pipeline import Passages, Queries, passage_itself
        from raybge.search.session import Stages

        parse, key = (parse_document, id_key) if arguments.qrels else (parse_passage, text_key)
        corpus = Passages(surveys[0], parse, passage_itself, key)
        queries = Queries(surveys[1], parse_judged, relevant, key)
        stages = Stages()
        with stages("deduplicate"):
            kept = deduplicate(corpus.survey, corpus.parse, corpus.texts, store, key)
        stages.count("deduplicate", int(kept.found_B.sum()), "passages")
        return cls(corpus, queries, kept, store, stages)

    @property
    def counts(self) -> dict[str, int]:
        return {"queries": self.queries.survey.total_rows, "corpus": self.kept.passages}


def measured(arguments: EvaluateOptions, data: Data, cluster: Cluster, console: Console) -> Measured:
    """Plan, encode, search and measure with one model."""
    from raybge.cluster.resources import plan_workers
    from raybge.evaluation.estimate import estimate
    from raybge.evaluation.judgements import Measured, search_and_measure
    from raybge.search.index import hold, say_recall
    from raybge.search.pipeline import encode
    from raybge.search.saved_vectors import load, save
    from raybge.search.session import (
        check_search,
        describe_data,
        describe_memory,
        describe_model,
        embedder_of,
        shards_held,
    )
    from raybge.search.shards import Kind

    options = _encoder_options(arguments)
    kind, stages = Kind(arguments.index_factory, arguments.use_gpu_for_searching), data.stages
    check_search(arguments.use_gpu_for_searching, cluster, arguments.k, "k")
    plan = plan_workers(cluster, arguments.num_workers, arguments.use_gpu, arguments.cpus_per_worker, cores_a_worker=1)
    embedder = embedder_of(options, plan)
    size, dim = min(arguments.shard_size, data.kept.passages), embedder.dim
    held = shards_held(cluster, plan, kind, size, dim, arguments.shards_per_actor)
    console.info(f"cluster: {cluster.describe()}; {plan.describe('actor')}")
    console.info(describe_model(options))
    console.info(describe_data(data.queries, data.corpus, data.kept, arguments.shard_size))
    console.info(describe_memory(data.kept, data.queries, size, held, plan.workers, dim, arguments.k))
    if arguments.k > data.kept.passages:
        console.info(f"--k {arguments.k:,}: the corpus has {data.kept.passages:,} passages, and all of them are ranked")
    sizes = data.corpus, data.kept, data.queries
    if cost := estimate(*sizes, embedder, plan, kind, arguments.load_embedding, arguments.k):
        console.info(cost)
    if arguments.dry_run:
        return Measured({})
    made_by = _passage_identity(options)
    loaded = load(arguments.save_path) if arguments.load_embedding else None
    if loaded:
        loaded.check(made_by, data.kept.passages)
    with stages("encode"):
        passages, rows = encode(data.corpus, data.kept, data.queries, embedder, data.store, plan, console, loaded)
    if loaded:
        loaded.check_texts(passages)
    if arguments.save_embedding:
        save(os.path.abspath(arguments.save_path), made_by, passages, data.store)
        console.info(f"written: {arguments.save_path}")
    stages.count("encode", data.kept.passages + data.queries.survey.total_rows, "texts")
    with stages("index"):
        index = hold(passages, data.store, arguments.shard_size, plan, kind, held)
    with index, stages("search"):
        found = search_and_measure(arguments, index, rows, console)
        say_recall(index, rows, arguments.k, arguments.search_batch_size, console)
    stages.count("search", data.queries.survey.total_rows, "queries")
    stages.say(console)
    return replace(found, result={**found.result, **data.counts})


# --- check ------------------------------------------------------------------------------------------------


def _check(arguments: EvaluateOptions) -> None:
    from raybge.model.folder import check_model_folder, vector_width
    from raybge.search.saved_vectors import load
    from raybge.search.session import check_numbers
    from raybge.search.shards import check_factory, check_gpu_search
    from raybge.util import atomic_write as output

    if arguments.use_gpu_for_searching:
        check_gpu_search()
    check_numbers(
        arguments,
        "k",
        "search_batch_size",
        "shard_size",
        "shards_per_actor",
        "batch_size",
        "query_max_len",
        "passage_max_len",
    )
    for name, flag in (
        (arguments.model_name_or_path, "--model_name_or_path"),
        *((model, "--compare") for model in arguments.compare or []),
    ):
        check_model_folder(name, flag)
    for name in ("save_embedding", "load_embedding", "run_file"):
        if getattr(arguments, name) and arguments.compare:
            raise UserError(f"--{name} is of one model: leave out --compare")
    _check_data(arguments)
    if arguments.load_embedding:
        if arguments.save_embedding:
            raise UserError("--save_embedding and --load_embedding: give one")
        load(arguments.save_path)
    check_factory(arguments.index_factory, vector_width(arguments.model_name_or_path, arguments.cache_dir))
    for name in ("metrics_file", "run_file", *(["save_path"] if arguments.save_embedding else [])):
        if path := getattr(arguments, name):
            output.exists(path, f"--{name}")


def _check_data(arguments: EvaluateOptions) -> None:
    """UserError unless there is either a corpus with queries, or tasks of MTEB."""
    own = ("corpus_data", "query_data")
    if not arguments.mteb_tasks:
        if missing := [f"--{name}" for name in own if not getattr(arguments, name)]:
            raise UserError(f"missing: {', '.join(missing)} (or --mteb_tasks)")
        return
    not_theirs = (*own, "qrels", "compare", "run_file", "save_embedding", "load_embedding")
    if given := [f"--{name}" for name in not_theirs if getattr(arguments, name)]:
        raise UserError(f"--mteb_tasks measures tasks with data of their own: leave out {', '.join(given)}")


def _resolved(arguments: EvaluateOptions) -> EvaluateOptions:
    """A BEIR folder, given for corpus and queries, stands for its files."""
    data = arguments.corpus_data or [], arguments.query_data or []
    folders = {path for paths in data for path in paths if _is_beir(path)}
    if not folders:
        return arguments
    if len(folders) > 1 or any(len(paths) != 1 for paths in data):
        raise UserError(
            f"--corpus_data, --query_data: {min(folders)} is a BEIR folder: give the same one for both, alone"
        )
    [folder] = folders
    return replace(
        arguments,
        corpus_data=[_first(folder, "corpus.jsonl", "corpus.jsonl.gz")],
        query_data=[_first(folder, "queries.jsonl", "queries.jsonl.gz")],
        qrels=arguments.qrels or os.path.join(folder, "qrels", "test.tsv"),
    )


def _is_beir(path: str) -> bool:
    return os.path.isdir(os.path.join(path, "qrels"))


def _first(folder: str, *names: str) -> str:
    return next((path for name in names if os.path.exists(path := os.path.join(folder, name))), f"{folder}/{names[0]}")


def _sources(arguments: EvaluateOptions, work: str, console: Console) -> list[Source]:
    from raybge.data.groups import parse_document, parse_judged, parse_passage
    from raybge.data.source_files import list_files
    from raybge.search.session import Source, check_apart

    parse = parse_document if arguments.qrels else parse_passage
    corpus = Source(list_files(arguments.corpus_data or [], "--corpus_data"), "--corpus_data", parse)
    queries = Source(list_files(arguments.query_data or [], "--query_data"), "--query_data", parse_judged)
    for name in ("metrics_file", "run_file"):
        if path := getattr(arguments, name):
            check_apart(path, f"--{name}", [corpus, queries])
    return [corpus, _judged_queries(arguments, queries, work, console) if arguments.qrels else queries]


def _judged_queries(arguments: EvaluateOptions, queries: Source, work: str, console: Console) -> Source:
    """The queries joined with their judgements, in a file of the work folder."""
    from raybge.data.groups import parse_judged
    from raybge.data.qrels import join, parse_query, read_qrels
    from raybge.data.source_files import list_files
    from raybge.search.session import Source, surveyed
    from raybge.util.filesystem import extended

    assert arguments.qrels
    grades = read_qrels(arguments.qrels, "--qrels")
    found = surveyed(replace(queries, parse=parse_query), work, arguments.on_bad_rows, console)
    path = extended(work, "/judged.jsonl")
    joined = join(found, grades, path)
    if joined.unjudged:
        console.info(f"--query_data: {joined.unjudged:,} queries without a relevant document are left out")
    if joined.unknown:
        named = ", ".join(joined.unknown[:3]) + (", ..." if len(joined.unknown) > 3 else "")
        says = f"--qrels: {len(joined.unknown):,} judged queries are not in --query_data ({named})"
        if arguments.on_bad_rows == "stop":
            raise UserError(f"{says}; --on_bad_rows skip leaves them out")
        console.info(f"{says}: left out")
    return Source(list_files(path, "--query_data"), "--query_data", parse_judged)


def _encoder_options(arguments: EvaluateOptions) -> dict[str, Any]:
    from raybge.model.folder import read_settings

    name = arguments.model_name_or_path
    folder_length = read_settings(name, arguments.cache_dir).max_length
    return {
        "model_name_or_path": os.path.abspath(name) if os.path.exists(name) else name,
        "normalize_embeddings": arguments.normalize_embeddings,
        "use_fp16": arguments.use_fp16,
        "query_instruction_for_retrieval": INSTRUCTION if arguments.add_instruction else None,
        "pooling_method": arguments.pooling_method,
        "trust_remote_code": arguments.trust_remote_code,
        "cache_dir": arguments.cache_dir,
        "batch_size": arguments.batch_size,
        "query_max_length": arguments.query_max_len or folder_length or QUERY_LENGTH,
        "passage_max_length": arguments.passage_max_len or folder_length or PASSAGE_LENGTH,
    }


def _passage_identity(options: dict[str, Any]) -> str:
    """Changes with whatever makes a passage's vector."""
    from raybge.search.model_identity import model_identity
    from raybge.search.store import digest

    shaping = ("normalize_embeddings", "use_fp16", "pooling_method", "passage_max_length")
    model = model_identity(options["model_name_or_path"], options["cache_dir"])
    return digest(model, [options[name] for name in shaping])


# --- report -----------------------------------------------------------------------------------------------


def _report(arguments: EvaluateOptions, data: Data, found: Sequence[Measured], console: Console) -> None:
    from raybge.evaluation.metrics import CUTOFFS
    from raybge.util import atomic_write as output

    result = found[0].result
    kinds = list(dict.fromkeys(name.split("@")[0] for name in found[0].values))
    cutoffs = [cutoff for cutoff in CUTOFFS if cutoff <= arguments.k]
    rows = [(kind, *(f"{result[f'{kind}@{cutoff}']:.4f}" for cutoff in cutoffs)) for kind in kinds]
    console.table(("", *(f"@{cutoff}" for cutoff in cutoffs)), rows)
    if arguments.compare:
        result["compare"] = _compared(arguments.compare, found, console)
    if arguments.metrics_file:
        with output.written_aside(arguments.metrics_file, "--metrics_file") as out:
            out.write((json.dumps(result, indent=2) + "\n").encode())
        _write_page(arguments, data, found)
    for path in filter(None, (arguments.metrics_file, arguments.run_file)):
        console.info(f"written: {path}")


def _compared(models: Sequence[str], found: Sequence[Measured], console: Console) -> dict[str, Any]:
    """Each further model against the first, by metric; the main ones on the console."""
    from raybge.evaluation.significance import LEVEL, compare

    first, *others = found
    shown = [name for name in MAIN if name in first.values]
    compared: dict[str, Any] = {}
    rows = []
    for model, other in zip(models, others, strict=True):
        differences = {name: compare(first.values[name], other.values[name]) for name in other.values}
        compared[model] = {
            "metrics": {name: value for name, value in other.result.items() if "@" in name},
            "difference": {name: asdict(each) for name, each in differences.items()},
        }
        for name in shown:
            d = differences[name]
            interval = f"{d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
            rows.append((model, name, f"{other.result[name]:.4f}", interval, f"{d.wins:,}", f"{d.losses:,}"))
    console.info(f"\nagainst the first model, with {LEVEL:.0%} intervals by paired bootstrap over the queries")
    console.table(("model", "metric", "value", "difference", "better", "worse"), rows)
    return compared


def _write_page(arguments: EvaluateOptions, data: Data, found: Sequence[Measured]) -> None:
    """Beside the metrics: what a person looks at; a further model's values beside this one's."""
    from raybge.cli.parser import given
    from raybge.evaluation import page as report
    from raybge.evaluation.metric_changes import change
    from raybge.report.page import written
    from raybge.report.run_details import Run, library_versions
    from raybge.util.filesystem import extended

    def about() -> report.Evaluation:
        first = found[0]
        files = [each for survey in (data.corpus.survey, data.queries.survey) for each in survey.rows_by_file().items()]
        other = found[1].values if len(found) > 1 else {}
        return report.Evaluation(
            run=Run("evaluate", given(arguments), arguments.model_name_or_path, files, versions=library_versions()),
            metrics={name: value for name, value in first.result.items() if name != "compare"},
            per_query=first.values,
            comparison=[change(name, other[name], first.values[name]) for name in MAIN if name in other],
            compared_with=(arguments.compare or ["before"])[0],
            seconds=data.stages.seconds,
        )

    assert arguments.metrics_file
    written(report.write, extended(arguments.metrics_file, ".report.html"), about)
