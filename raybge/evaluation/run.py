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
    from raybge.search.inputs import InputFiles
    from raybge.search.search_data import SearchData
    from raybge.search.stage_clock import StageClock
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
    from raybge.cluster.spec import ScaleSpec
    from raybge.search.inputs import InputSpec, open_inputs
    from raybge.search.store import Store, work_folder

    _check(arguments)
    with work_folder(arguments.storage_path, "evaluate") as work:
        sources = _sources(arguments, work, console)
        inputs = InputSpec(
            sources,
            arguments.on_bad_rows,
            written={"--metrics_file": arguments.metrics_file, "--run_file": arguments.run_file},
            models={"--model_name_or_path": arguments.model_name_or_path},
        )
        with open_inputs(inputs, ScaleSpec.from_options(arguments), work, console) as (cluster, surveys):
            yield Data.of(arguments, surveys, Store(work)), cluster


@dataclass(frozen=True)
class Data:
    """Corpus and queries, the same for all models that are compared."""

    search: SearchData
    store: Store
    stages: StageClock

    @classmethod
    def of(cls, arguments: EvaluateOptions, surveys: Sequence[Survey], store: Store) -> Data:
        """By the documents' ids where they are judged by these, else by their texts."""
        from raybge.data.groups import id_key, parse_document, parse_judged, parse_passage, text_key
        from raybge.evaluation.judgements import relevant
        from raybge.search.deduplication import deduplicate
        from raybge.search.search_data import Passages, Queries, SearchData, single_passage
        from raybge.search.stage_clock import StageClock

        parse, key = (parse_document, id_key) if arguments.qrels else (parse_passage, text_key)
        corpus = Passages(surveys[0], parse, single_passage, key)
        queries = Queries(surveys[1], parse_judged, relevant, key)
        stages = StageClock()
        with stages("deduplicate"):
            kept = deduplicate(corpus.survey, corpus.parse, corpus.texts, store, key)
        stages.count("deduplicate", int(kept.total_B.sum()), "passages")
        return cls(SearchData(corpus, kept, queries), store, stages)

    @property
    def counts(self) -> dict[str, int]:
        return {"queries": self.search.queries.survey.total_rows, "corpus": self.search.unique.passages}


def measured(arguments: EvaluateOptions, data: Data, cluster: Cluster, console: Console) -> Measured:
    """Plan, encode, search and measure with one model."""
    from raybge.cluster.resources import plan_workers
    from raybge.evaluation.estimate import estimate
    from raybge.evaluation.judgements import Measured, search_and_measure
    from raybge.search.index import build_index, report_recall
    from raybge.search.pipeline import encode
    from raybge.search.saved_vectors import load, save
    from raybge.model.spec import EncoderSpec
    from raybge.search.embedder import make_embedder
    from raybge.search.memory import SearchMemory
    from raybge.search.plan_lines import describe_data, describe_model
    from raybge.search.spec import IndexSpec

    options = _encoder_options(arguments)
    index_spec, stages = IndexSpec.from_options(arguments), data.stages
    index_spec.check_candidates(cluster, arguments.k, "k")
    plan = plan_workers(cluster, arguments.num_workers, arguments.use_gpu, arguments.cpus_per_worker, cores_a_worker=1)
    embedder = make_embedder(EncoderSpec(**options), plan)
    memory = SearchMemory.plan(index_spec, cluster, plan, data.search.unique.passages, embedder.dim)
    console.info(f"cluster: {cluster.describe()}; {plan.describe('actor')}")
    console.info(describe_model(EncoderSpec(**options)))
    console.info(describe_data(data.search, arguments.shard_size))
    console.info(memory.describe(data.search, arguments.k))
    if arguments.k > data.search.unique.passages:
        console.info(f"--k {arguments.k:,}: the corpus has {data.search.unique.passages:,} passages, and all of them are ranked")
    if cost := estimate(data.search, embedder, plan, index_spec.kind, arguments.load_embedding, arguments.k):
        console.info(cost)
    if arguments.dry_run:
        return Measured({})
    made_by = _passage_identity(options)
    loaded = load(arguments.save_path) if arguments.load_embedding else None
    if loaded:
        loaded.check(made_by, data.search.unique.passages)
    with stages("encode"):
        passages, rows = encode(data.search, embedder, data.store, plan, console, loaded)
    if loaded:
        loaded.check_texts(passages)
    if arguments.save_embedding:
        save(os.path.abspath(arguments.save_path), made_by, passages, data.store)
        console.info(f"written: {arguments.save_path}")
    stages.count("encode", data.search.texts, "texts")
    with stages("index"):
        index = build_index(passages, data.store, index_spec, plan, memory.resident_shards)
    with index, stages("search"):
        found = search_and_measure(arguments, index, rows, console)
        report_recall(index, rows, arguments.k, console)
    stages.count("search", data.queries.survey.total_rows, "queries")
    stages.report(console)
    return replace(found, result={**found.result, **data.counts})


# --- check ------------------------------------------------------------------------------------------------


def _check(arguments: EvaluateOptions) -> None:
    from raybge.model.folder import check_model_folder, vector_width
    from raybge.search.saved_vectors import load
    from raybge.search.spec import check_at_least_one
    from raybge.search.faiss_index import check_factory, check_gpu_search
    from raybge.util import atomic_write as output

    if arguments.use_gpu_for_searching:
        check_gpu_search()
    check_at_least_one(
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


def _sources(arguments: EvaluateOptions, work: str, console: Console) -> list[InputFiles]:
    from raybge.data.groups import parse_document, parse_judged, parse_passage
    from raybge.data.source_files import list_files
    from raybge.search.inputs import InputFiles, check_not_an_input

    parse = parse_document if arguments.qrels else parse_passage
    corpus = InputFiles(list_files(arguments.corpus_data or [], "--corpus_data"), "--corpus_data", parse)
    queries = InputFiles(list_files(arguments.query_data or [], "--query_data"), "--query_data", parse_judged)
    for name in ("metrics_file", "run_file"):
        if path := getattr(arguments, name):
            check_not_an_input(path, f"--{name}", [corpus, queries])
    return [corpus, _judged_queries(arguments, queries, work, console) if arguments.qrels else queries]


def _judged_queries(arguments: EvaluateOptions, queries: InputFiles, work: str, console: Console) -> InputFiles:
    """The queries joined with their judgements, in a file of the work folder."""
    from raybge.data.groups import parse_judged
    from raybge.data.qrels import join, parse_query, read_qrels
    from raybge.data.source_files import list_files
    from raybge.search.inputs import InputFiles, survey_input
    from raybge.util.filesystem import append_to_path

    assert arguments.qrels
    grades = read_qrels(arguments.qrels, "--qrels")
    found = survey_input(replace(queries, parse=parse_query), work, arguments.on_bad_rows, console)
    path = append_to_path(work, "/judged.jsonl")
    joined = join(found, grades, path)
    if joined.unjudged:
        console.info(f"--query_data: {joined.unjudged:,} queries without a relevant document are left out")
    if joined.unknown:
        named = ", ".join(joined.unknown[:3]) + (", ..." if len(joined.unknown) > 3 else "")
        says = f"--qrels: {len(joined.unknown):,} judged queries are not in --query_data ({named})"
        if arguments.on_bad_rows == "stop":
            raise UserError(f"{says}; --on_bad_rows skip leaves them out")
        console.info(f"{says}: left out")
    return InputFiles(list_files(path, "--query_data"), "--query_data", parse_judged)


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
    from raybge.util.digest import digest

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
        with output.open_atomic(arguments.metrics_file, "--metrics_file") as out:
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
    from raybge.cli.parser import changed_values
    from raybge.evaluation import page as report
    from raybge.evaluation.metric_changes import MetricChange
    from raybge.report.page import write_or_log
    from raybge.report.run_details import RunDetails, library_versions
    from raybge.util.filesystem import append_to_path

    def about() -> report.EvaluationReport:
        first = found[0]
        files = [each for survey in (data.search.passages.survey, data.search.queries.survey) for each in survey.rows_by_file().items()]
        other = found[1].values if len(found) > 1 else {}
        return report.EvaluationReport(
            run=RunDetails("evaluate", changed_values(arguments), arguments.model_name_or_path, files, versions=library_versions()),
            metrics={name: value for name, value in first.result.items() if name != "compare"},
            per_query=first.values,
            comparison=[MetricChange.from_queries(name, other[name], first.values[name]) for name in MAIN if name in other],
            compared_with=(arguments.compare or ["before"])[0],
            seconds=data.stages.seconds,
        )

    assert arguments.metrics_file
    write_or_log(report.write, append_to_path(arguments.metrics_file, ".report.html"), about)
