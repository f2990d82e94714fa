"""Retrieval with one model: plan, encode, index, search, measure. Corpus and queries are shared by several models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from raybge.cli.console import Console
from raybge.cluster.resources import Cluster
from raybge.data.groups import id_key, parse_document, parse_judged, parse_passage, text_key
from raybge.data.qrels import parse_answered
from raybge.data.source_files import list_files
from raybge.data.survey import Survey
from raybge.evaluation.estimate import estimate
from raybge.evaluation.judgments import ModelMetrics, known_texts, search_and_measure, write_judged_queries
from raybge.evaluation.spec import EvaluationSpec
from raybge.model.model_identity import model_identity
from raybge.model.spec import EncoderSpec
from raybge.search import saved_vectors
from raybge.search.deduplication import deduplicate
from raybge.search.embedder import exported_digest, make_embedder, with_export_dir
from raybge.search.id_conflicts import check_id_conflicts
from raybge.search.index import build_index, report_recall
from raybge.search.inputs import InputFiles, InputSpec, check_not_an_input, open_inputs
from raybge.search.memory import SearchMemory
from raybge.search.pipeline import encode
from raybge.search.plan_lines import describe_data, describe_model
from raybge.search.search_data import Passages, Queries, SearchData, single_passage
from raybge.search.stage_clock import StageClock
from raybge.search.store import EncodedBlock, Store, work_folder
from raybge.util.digest import digest


@dataclass(frozen=True)
class RetrievalData:
    """Deduplicated corpus and queries, and where they are encoded.

    Args:
        search: corpus and queries.
        cluster: the connected cluster.
        store: receives the encoded blocks.
        clock: measures the stages.
        encoders: the models that are evaluated, exported where their backend requires it.
    """

    search: SearchData
    cluster: Cluster
    store: Store
    clock: StageClock
    encoders: Sequence[EncoderSpec] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Number of queries and of distinct passages."""
        return {"queries": self.search.queries.survey.total_rows, "corpus": self.search.unique.passages}

    def with_store(self, store: Store) -> RetrievalData:
        """Return the same data with another store."""
        return replace(self, store=store)


@contextmanager
def open_data(spec: EvaluationSpec, console: Console) -> Iterator[RetrievalData]:
    """Connect to Ray and read corpus and queries; models can be evaluated within the `with` block.

    Args:
        spec: the evaluation.
        console: prints skipped rows.

    Yields:
        The data.

    Raises:
        UserError: a file or row that cannot be used, or a path that a node of the cluster does not see.
    """
    with work_folder(spec.scale.storage_path, "evaluate") as work:
        inputs = InputSpec(
            _input_files(spec, work, console),
            spec.files.on_bad_rows,
            written={"--metrics_file": spec.metrics_file, "--run_file": spec.run_file},
            models={"--model_name_or_path": spec.model.name},
            encoders=[model.encoder for model in spec.models],
            allow_unknown_tokens=spec.allow_unknown_tokens,
        )
        encoders = [with_export_dir(model.encoder, work, spec.scale.storage_path) for model in spec.models]
        exports = [] if spec.dry_run else encoders
        with open_inputs(inputs, spec.scale, work, console, exports) as (cluster, surveys):
            clock, store = StageClock(), Store(work)
            with clock("deduplicate"), console.phase("removing duplicates"):
                search = _search_data(spec, surveys, store, console)
            clock.count("deduplicate", int(search.unique.total_B.sum()), "passage")
            yield RetrievalData(search, cluster, store, clock, encoders)


def _input_files(spec: EvaluationSpec, work: str, console: Console) -> list[InputFiles]:
    """List the files of the corpus, and of the queries joined with their judgments."""
    files = spec.files
    parse = parse_document if files.qrels else parse_passage
    corpus = InputFiles(list_files(files.corpus, "--corpus_data", files.any_text), "--corpus_data", parse)
    queries = InputFiles(list_files(files.queries, "--query_data", files.any_text), "--query_data", parse_judged)
    for path, flag in ((spec.metrics_file, "--metrics_file"), (spec.run_file, "--run_file")):
        if path:
            check_not_an_input(path, flag, [corpus, queries])
    return [corpus, write_judged_queries(files, queries, work, console) if files.qrels else queries]


def _search_data(spec: EvaluationSpec, surveys: Sequence[Survey], store: Store, console: Console) -> SearchData:
    """Deduplicate the corpus: by document ids if there are judgments of these, else by texts."""
    if not spec.files.qrels:
        corpus = Passages(surveys[0], parse_passage, single_passage, text_key)
        unique = deduplicate(corpus.survey, corpus.parse, corpus.texts, store, corpus.key)
        return SearchData(corpus, unique, Queries(surveys[1], parse_judged, known_texts, text_key))
    corpus = Passages(surveys[0], parse_document, single_passage, id_key)
    unique = deduplicate(corpus.survey, corpus.parse, corpus.texts, store, corpus.key, compare_texts=True)
    check_id_conflicts(corpus, unique, "--corpus_data", spec.files.on_bad_rows, console)
    return SearchData(corpus, unique, Queries(surveys[1], parse_answered, known_texts, id_key))


def evaluate_model(spec: EvaluationSpec, encoder: EncoderSpec, data: RetrievalData, console: Console) -> ModelMetrics:
    """Plan, encode, index, search and measure with one model.

    Args:
        spec: the evaluation.
        encoder: the model.
        data: corpus and queries.
        console: prints the plan, the progress and the stages.

    Returns:
        The metrics; empty on a dry run, which ends after the plan.

    Raises:
        UserError: a cluster that is too small, or a file of embeddings that does not fit.
    """
    search, clock, store = data.search, data.clock, data.store
    ranking = spec.ranking
    plan = spec.scale.plan(data.cluster, cores_a_worker=1)
    index_spec = spec.index.on_cluster(data.cluster, plan, ranking.depth, "k")
    embedder = make_embedder(encoder, plan)
    memory = SearchMemory.plan(index_spec, data.cluster, plan, search.unique.passages, embedder.dim)
    console.info(f"cluster: {data.cluster.describe()}; {plan.describe('actor')}")
    if place := index_spec.describe_place():
        console.info(place)
    _print_plan(spec, encoder, search, memory, console)
    with console.phase("estimating the time"):
        cost = estimate(search, embedder, plan, index_spec.kind, ranking.k, passages_saved=spec.embeddings.load)
    if cost:
        console.info(cost)
    if spec.dry_run:
        return ModelMetrics({})
    saved = _load_embeddings(spec, encoder, search.unique.passages)
    with clock("encode"):
        passages, queries = encode(search, embedder, store, plan, console, saved)
    if saved:
        saved.check_texts(passages)
    _save_embeddings(spec, encoder, passages, store, console)
    clock.count("encode", search.texts, "text")
    with clock("index"), console.phase("building the index"):
        index = build_index(passages, store, index_spec, plan, memory.resident_shards)
    with index, clock("search"):
        metrics = search_and_measure(index, queries, ranking, spec.run_file, console)
        report_recall(index, queries, ranking.depth, console)
    clock.count("search", data.counts["queries"], "query")
    clock.report(console)
    return replace(metrics, summary={**metrics.summary, **data.counts})


def _print_plan(
    spec: EvaluationSpec, encoder: EncoderSpec, search: SearchData, memory: SearchMemory, console: Console
) -> None:
    console.info(describe_model(encoder))
    console.info(describe_data(search, spec.index.shard_size))
    console.detail(memory.describe(search, spec.ranking.depth))
    if spec.ranking.k > search.unique.passages:
        console.info(
            f"--k {spec.ranking.k:,}: the corpus has only {search.unique.passages:,} passages; all of them are ranked"
        )


# --- embeddings of the corpus in a file -------------------------------------------------------------------------------


def _load_embeddings(spec: EvaluationSpec, encoder: EncoderSpec, passages: int) -> saved_vectors.SavedEmbeddings | None:
    if not spec.embeddings.load:
        return None
    saved = saved_vectors.load(spec.embeddings.path)
    saved.check(_passage_identity(encoder), passages)
    return saved


def _save_embeddings(
    spec: EvaluationSpec, encoder: EncoderSpec, passages: Sequence[EncodedBlock], store: Store, console: Console
) -> None:
    if spec.embeddings.save:
        saved_vectors.save(os.path.abspath(spec.embeddings.path), _passage_identity(encoder), passages, store)
        console.info(f"written: {spec.embeddings.path}")


def _passage_identity(encoder: EncoderSpec) -> str:
    """Return a digest of everything that the vectors of passages depend on."""
    settings = [
        encoder.normalize_embeddings,
        "bf16" if encoder.use_bf16 else encoder.use_fp16,
        encoder.pooling_method,
        encoder.passage_max_length,
    ]
    if encoder.backend.exported:
        settings += [str(encoder.backend), exported_digest(encoder)]
    return digest(model_identity(encoder.model_name_or_path, encoder.cache_dir), settings)
