"""Specs of evaluation, read once from the options of a command: finished models, and evaluation in training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raybge.cli.checks import check_at_least
from raybge.cli.options import EvaluateOptions, TrainOptions
from raybge.cli.parser import changed_values
from raybge.cluster.spec import ScaleSpec
from raybge.data.prompts import Instructions
from raybge.model.folder import read_settings, vector_width
from raybge.model.folder_checks import check_model_folder
from raybge.model.spec import EncoderSpec
from raybge.search import saved_vectors
from raybge.search.spec import IndexSpec
from raybge.util.atomic_write import exists
from raybge.util.errors import UserError

INSTRUCTION = "Represent this sentence for searching relevant passages: "
QUERY_LENGTH, PASSAGE_LENGTH = 32, 128  # FlagEmbedding's defaults, if the model's folder states no length


@dataclass(frozen=True)
class ValidationSpec:
    """Queries and corpus of evaluation in training.

    Args:
        queries: files, folders or globs of --eval_data.
        corpus: files, folders or globs of --eval_corpus; empty: every `pos` and `neg` of the queries.
        on_bad_rows: "stop" or "skip".
        any_text: --accept_any_text, see `SourceFile`.
        query_max_len: longest query in tokens, special ones included.
        passage_max_len: longest passage in tokens, special ones included.
    """

    queries: tuple[str, ...]
    corpus: tuple[str, ...]
    on_bad_rows: str
    any_text: bool
    query_max_len: int
    passage_max_len: int

    @classmethod
    def from_options(cls, options: TrainOptions) -> ValidationSpec | None:
        """Read --eval_data and --eval_corpus.

        Args:
            options: the command's options.

        Returns:
            The spec; None without --eval_data.

        Raises:
            UserError: --eval_corpus without --eval_data.
        """
        if not options.eval_data:
            if options.eval_corpus:
                raise UserError("--eval_corpus is searched with the queries of --eval_data: give --eval_data too")
            return None
        return cls(
            tuple(options.eval_data),
            tuple(options.eval_corpus or ()),
            options.on_bad_rows,
            options.accept_any_text,
            options.query_max_len,
            options.passage_max_len,
        )


@dataclass(frozen=True)
class RetrievalFiles:
    """Files of corpus and queries.

    Args:
        corpus: files, folders or globs of --corpus_data.
        queries: files, folders or globs of --query_data.
        qrels: file of relevance judgments by document id; None: the queries' rows contain their relevant passages.
        on_bad_rows: "stop" or "skip".
        any_text: --accept_any_text, see `SourceFile`.
        is_beir: they are those of a BEIR folder.
    """

    corpus: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    qrels: str | None = None
    on_bad_rows: str = "stop"
    any_text: bool = False
    is_beir: bool = False

    @classmethod
    def from_options(cls, options: EvaluateOptions) -> RetrievalFiles:
        """Read the data flags; a BEIR folder, given as corpus and as queries, is replaced by its files.

        Args:
            options: the command's options.

        Returns:
            The files.

        Raises:
            UserError: a BEIR folder together with other files.
        """
        corpus, queries, qrels = options.corpus_data or [], options.query_data or [], options.qrels
        folders = {path for path in (*corpus, *queries) if os.path.isdir(os.path.join(path, "qrels"))}
        if folders:
            if len(folders) > 1 or len(corpus) != 1 or len(queries) != 1:
                raise UserError(
                    f"--corpus_data, --query_data: {min(folders)} is a BEIR folder; give the same folder for both and "
                    "nothing else"
                )
            [folder] = folders
            corpus = [_existing(folder, "corpus.jsonl", "corpus.jsonl.gz")]
            queries = [_existing(folder, "queries.jsonl", "queries.jsonl.gz")]
            qrels = qrels or os.path.join(folder, "qrels", "test.tsv")
        return cls(tuple(corpus), tuple(queries), qrels, options.on_bad_rows, options.accept_any_text, bool(folders))


@dataclass(frozen=True)
class Ranking:
    """Passages that are measured for each query.

    Args:
        k: number of passages.
        drop_self_hits: leave out the passage that is the query itself, before the first k are taken.
    """

    k: int
    drop_self_hits: bool = False

    @property
    def depth(self) -> int:
        """Number of passages to retrieve."""
        return self.k + self.drop_self_hits


@dataclass(frozen=True)
class EmbeddingFile:
    """File of the corpus's embeddings (`--save_path`), and whether this run writes or reads it."""

    path: str
    save: bool = False
    load: bool = False


@dataclass(frozen=True)
class EvaluatedModel:
    """A model: its name as the flag states it, and how to load it."""

    name: str
    encoder: EncoderSpec


@dataclass(frozen=True)
class EvaluationSpec:
    """An evaluation of retrieval or, with `mteb_tasks`, of MTEB tasks.

    Args:
        models: the model and those of --compare.
        files: corpus and queries.
        mteb_tasks: names of MTEB tasks; if there are any, `files` are empty.
        ranking: passages that are retrieved and measured.
        index: index of the corpus.
        embeddings: file of the corpus's embeddings.
        metrics_file: JSON file to write; None for none.
        run_file: TREC run file to write; None for none.
        allow_unknown_tokens: words of the data may be unknown to the models' tokenizers.
        dry_run: print the plan and exit.
        scale: workers and cluster.
        flags: options that differ from their defaults, for the report.
    """

    models: tuple[EvaluatedModel, ...]
    files: RetrievalFiles
    mteb_tasks: tuple[str, ...]
    ranking: Ranking
    index: IndexSpec
    embeddings: EmbeddingFile
    metrics_file: str | None
    run_file: str | None
    allow_unknown_tokens: bool
    dry_run: bool
    scale: ScaleSpec
    flags: Mapping[str, Any]

    @property
    def model(self) -> EvaluatedModel:
        """The model that is evaluated, without those that it is compared with."""
        return self.models[0]

    @classmethod
    def from_options(cls, options: EvaluateOptions) -> EvaluationSpec:
        """Check and resolve the options.

        Args:
            options: the command's options.

        Returns:
            The spec.

        Raises:
            UserError: an invalid flag or model.
        """
        index = IndexSpec.from_options(options)
        check_at_least(1, options, "k", "batch_size", "query_max_len", "passage_max_len")
        check_model_folder(options.model_name_or_path, "--model_name_or_path")
        for name in options.compare or []:
            check_model_folder(name, "--compare")
        _check_combinations(options)
        _check_data(options)
        if options.load_embedding:
            saved_vectors.load(options.save_path)
        index.check_factory(vector_width(options.model_name_or_path, options.cache_dir))
        for name in ("metrics_file", "run_file", *(["save_path"] if options.save_embedding else [])):
            if path := getattr(options, name):
                exists(path, f"--{name}")  # raises for a folder
        names = [options.model_name_or_path, *(options.compare or [])]
        files = RetrievalFiles() if options.mteb_tasks else RetrievalFiles.from_options(options)
        models = tuple(EvaluatedModel(name, evaluation_encoder(options, name)) for name in names)
        drop = files.is_beir if options.drop_self_hits is None else options.drop_self_hits
        return cls(
            models=models,
            files=files,
            mteb_tasks=tuple(options.mteb_tasks or ()),
            ranking=Ranking(options.k, drop),
            index=index,
            embeddings=EmbeddingFile(options.save_path, options.save_embedding, options.load_embedding),
            metrics_file=options.metrics_file,
            run_file=options.run_file,
            allow_unknown_tokens=options.allow_unknown_tokens,
            dry_run=options.dry_run,
            scale=ScaleSpec.from_options(options, on_cpu=models[0].encoder.backend.exported),
            flags=changed_values(options),
        )


def evaluation_encoder(options: EvaluateOptions, model: str) -> EncoderSpec:
    """Resolve how a model is loaded; lengths come from the flags, else from the model's folder, else FlagEmbedding's.

    Args:
        options: the command's options.
        model: folder or hub name, in place of the options' own.

    Returns:
        The encoder's spec.
    """
    folder_length = read_settings(model, options.cache_dir).max_length
    return EncoderSpec.from_options(
        options,
        model_name_or_path=model,
        query_instruction_for_retrieval=INSTRUCTION
        if options.add_instruction
        else options.query_instruction_for_retrieval,
        query_max_length=options.query_max_len or folder_length or QUERY_LENGTH,
        passage_max_length=options.passage_max_len or folder_length or PASSAGE_LENGTH,
    )


def _check_combinations(options: EvaluateOptions) -> None:
    for name in ("save_embedding", "load_embedding", "run_file"):
        if getattr(options, name) and options.compare:
            raise UserError(f"--{name} applies to a single model; omit --compare")
    Instructions(query_format=options.query_instruction_format, passage_format=options.passage_instruction_format)
    if options.add_instruction and options.query_instruction_for_retrieval is not None:
        raise UserError("--add_instruction and --query_instruction_for_retrieval both set the instruction: give one")
    if options.save_embedding and options.load_embedding:
        raise UserError("--save_embedding and --load_embedding exclude each other; omit one of them")


def _check_data(options: EvaluateOptions) -> None:
    """Raise a UserError unless there is either a corpus with queries or a list of MTEB tasks."""
    data_flags = ("corpus_data", "query_data")
    if not options.mteb_tasks:
        if missing := [f"--{name}" for name in data_flags if not getattr(options, name)]:
            raise UserError(f"missing: {', '.join(missing)} (or --mteb_tasks)")
        return
    retrieval_only = (*data_flags, "qrels", "compare", "run_file", "save_embedding", "load_embedding")
    if options.drop_self_hits is not None:
        raise UserError(
            "--drop_self_hits: each of the --mteb_tasks has a setting of its own (ignore_identical_ids); omit the flag"
        )
    if conflicts := [f"--{name}" for name in retrieval_only if getattr(options, name)]:
        raise UserError(f"--mteb_tasks: the tasks have data of their own; omit {', '.join(conflicts)}")


def _existing(folder: str, *names: str) -> str:
    """Return the path of the first of these files that exists; the first name if none does."""
    paths = [os.path.join(folder, name) for name in names]
    return next(filter(os.path.exists, paths), paths[0])
