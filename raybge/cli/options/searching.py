"""Options of the commands that encode and search, and of those that chain commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from raybge.cli.flag import Flag, flag
from raybge.cli.options import flagembedding
from raybge.cli.options.common import (
    BATCH_SIZES,
    CROSS_ENCODER,
    DATA,
    FP16_TEXT,
    METRICS,
    MINING,
    MODEL,
    MODEL_NAMES,
    PASSAGE_LENGTHS,
    QUERY_LENGTHS,
    RELABELLING,
    RUN,
    SCALE,
    VECTORS,
    CommonOptions,
    IndexOptions,
    InstructionOptions,
    ModelOptions,
    PoolingOptions,
    PrecisionOptions,
    TokenizerOptions,
)


@dataclass(kw_only=True)
class MineOptions(
    IndexOptions, InstructionOptions, PoolingOptions, PrecisionOptions, TokenizerOptions, ModelOptions, CommonOptions
):
    """Mine hard negatives: passages that the model ranks high for a query although they do not answer it."""

    other_flags: ClassVar[tuple[Flag, ...]] = flagembedding.MINING
    # Values that --preset gives to flags that are unset. Top negatives below 95% of the positive's score are the best
    # choice of NV-Retriever (https://arxiv.org/abs/2407.15831). From rank 0: the margin leaves out the false ones.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "strong": {
            "sampling_strategy": "top",
            "range_for_sampling": "0-200",
            "relative_margin": 0.05,
            "keep_scores": True,
        }
    }

    model_name_or_path: str | None = flag(None, MODEL, "embedding model: folder or hub name", aliases=MODEL_NAMES)
    input_file: list[str] = flag(..., DATA, "groups {query, pos, neg}: files, folders or globs")
    output_file: str = flag(..., DATA, "output file for the groups with mined `neg` (.jsonl, .jsonl.gz, .jsonl.zst)")
    corpus_data: list[str] | None = flag(
        None,
        DATA,
        "passages {text} to mine from; default: every `pos` and `neg` of input_file",
        aliases=("candidate_pool",),
    )
    batch_size: int = flag(256, MODEL, "texts per encoding batch on a GPU", aliases=BATCH_SIZES)
    query_max_len: int | None = flag(
        None, MODEL, "maximum query length in tokens; default: the model's own", aliases=QUERY_LENGTHS
    )
    passage_max_len: int | None = flag(
        None, MODEL, "maximum passage length in tokens; default: the model's own", aliases=PASSAGE_LENGTHS
    )

    preset: str | None = flag(
        None,
        MINING,
        "strong: --sampling_strategy top --range_for_sampling 0-200 --relative_margin 0.05 --keep_scores, each of "
        "which may be set to another value; default: FlagEmbedding's choice",
        choices=("strong",),
    )
    range_for_sampling: str = flag(
        "10-210", MINING, "range lo-hi of the ranks to sample from: 0-based, lo to hi-1 of the full ranking"
    )
    negative_number: int = flag(15, MINING, "negatives per row")
    sampling_strategy: str = flag(
        "random", MINING, "random: sample uniformly; top: take the highest ranked", choices=("random", "top")
    )
    absolute_margin: float | None = flag(
        None, MINING, "minimum difference between the score of each positive and a negative's score"
    )
    relative_margin: float | None = flag(
        None, MINING, "the same as a share of the positive's score; 0.05 accepts scores below 95% of it"
    )
    max_score: float | None = flag(None, MINING, "maximum score of a negative")
    min_score: float | None = flag(None, MINING, "minimum score of a negative")
    keep_scores: bool = flag(False, MINING, "write `pos_scores` and `neg_scores`")
    seed: int = flag(42, MINING, "seed of the sampling")
    rescore: bool = flag(
        False, MINING, "score the candidates of a model in bf16, fp16 or int8 again in fp32, before any is chosen"
    )

    cross_encoder: str | None = flag(
        None,
        CROSS_ENCODER,
        "cross-encoder whose scores replace the embedding scores and are written: folder or hub name",
        aliases=("reranker_name_or_path",),
    )
    score_only: bool = flag(False, CROSS_ENCODER, "mine nothing; add the cross_encoder's scores to the rows")
    reranker_batch_size: int = flag(256, CROSS_ENCODER, "pairs per batch on a GPU")
    reranker_max_length: int | None = flag(None, CROSS_ENCODER, "maximum pair length in tokens")
    reranker_query_max_length: int | None = flag(None, CROSS_ENCODER, "maximum query length in tokens")
    normalize_scores: bool = flag(
        False, CROSS_ENCODER, "apply the sigmoid to the cross_encoder's scores", aliases=("normalize",)
    )
    relabel: str | None = flag(
        None,
        RELABELLING,
        "what to do with negatives that the cross_encoder or the judge takes for positives: drop them, promote them to "
        "`pos`, or keep them with soft labels in `pos_scores` and `neg_scores`",
        choices=("drop", "promote", "soft"),
    )
    relabel_margin: float | None = flag(
        None,
        RELABELLING,
        "the cross_encoder takes a negative for a positive if its score exceeds the row's best positive by more than "
        "this; default: 0",
    )
    judge_url: str | None = flag(
        None,
        RELABELLING,
        "OpenAI-compatible endpoint of a language model that judges the negatives, such as http://localhost:8000/v1; "
        "its key is read from RAYBGE_API_KEY",
    )
    judge_model: str | None = flag(None, RELABELLING, "name of the judge at judge_url")
    judge_concurrency: int = flag(8, RELABELLING, "requests to judge_url at a time")
    judge_timeout: float = flag(120.0, RELABELLING, "seconds until an answer of the judge must be complete")
    judge_parameters: dict[str, Any] | None = flag(
        None, RELABELLING, 'further fields of each request to judge_url; default: {"temperature": 0}'
    )
    overwrite: bool = flag(False, RUN, "replace an existing output_file; results in storage_path are still reused")


@dataclass(kw_only=True)
class RecipeOptions(CommonOptions):
    """Mine, fine-tune, mine with the new model, fine-tune it, merge with the base model, evaluate before and after."""

    model_name_or_path: str = flag(..., MODEL, "embedding model to start from: folder or hub name", aliases=MODEL_NAMES)
    train_data: list[str] = flag(..., DATA, "groups {query, pos, neg}: files, folders or globs")
    corpus_data: list[str] = flag(
        ..., DATA, "passages {text} for mining and for evaluation", aliases=("candidate_pool",)
    )
    query_data: list[str] = flag(..., DATA, "held-out queries with their answers {query, pos}")
    output_dir: str = flag(..., RUN, "shared folder for the results of all stages")
    seed: int = flag(42, RUN, "seed of every stage")
    max_failures: int = flag(0, SCALE, "restarts of training after the loss of a worker (-1: no limit)")


@dataclass(kw_only=True)
class EvaluateOptions(
    IndexOptions, InstructionOptions, PoolingOptions, PrecisionOptions, TokenizerOptions, ModelOptions, CommonOptions
):
    """Evaluate retrieval: exact search in a corpus, then MRR, nDCG, Recall and MAP."""

    other_flags: ClassVar[tuple[Flag, ...]] = flagembedding.EVALUATION

    model_name_or_path: str = flag(..., MODEL, "embedding model: folder or hub name", aliases=MODEL_NAMES)
    corpus_data: list[str] | None = flag(
        None,
        DATA,
        "passages {text}, {contents}, {content} or {body}: files, folders or globs",
        aliases=("candidate_pool",),
    )
    query_data: list[str] | None = flag(None, DATA, "queries with their answers: {query, pos} or {query, positive}")
    mteb_tasks: list[str] | None = flag(
        None, DATA, "names of MTEB tasks, in place of corpus_data and query_data", aliases=("tasks",)
    )
    qrels: str | None = flag(
        None,
        DATA,
        "relevance judgments by document id, in TREC or BEIR format; queries and passages then need an _id. "
        "Default for a BEIR folder: its qrels/test.tsv",
    )
    use_fp16: bool = flag(False, MODEL, FP16_TEXT, aliases=("fp16",))
    add_instruction: bool = flag(
        False, MODEL, "prefix each query with «Represent this sentence for searching relevant passages: »"
    )
    query_max_len: int | None = flag(
        None, MODEL, "maximum query length in tokens; default: the model's own, else 32", aliases=QUERY_LENGTHS
    )
    passage_max_len: int | None = flag(
        None, MODEL, "maximum passage length in tokens; default: the model's own, else 128", aliases=PASSAGE_LENGTHS
    )
    batch_size: int = flag(256, MODEL, "texts per encoding batch on a GPU", aliases=BATCH_SIZES)
    k: int = flag(100, METRICS, "passages retrieved per query", aliases=("search_top_k",))
    drop_self_hits: bool | None = flag(
        None,
        METRICS,
        "leave out the passage with the query's id (without qrels: with its text), before the first k are taken; "
        "default: True for BEIR folders, as BEIR does",
        aliases=("ignore_identical_ids",),
    )
    save_embedding: bool = flag(False, METRICS, "save the corpus embeddings to save_path")
    load_embedding: bool = flag(False, METRICS, "load the corpus embeddings from save_path")
    save_path: str = flag(
        "embeddings.memmap", METRICS, "file of the corpus embeddings: float32 after a header of 4,096 bytes"
    )
    metrics_file: str | None = flag(None, METRICS, "JSON file for the metrics", aliases=("eval_output_path",))
    run_file: str | None = flag(None, METRICS, "TREC run file for the retrieved passages")
    compare: list[str] | None = flag(
        None, METRICS, "further models to evaluate: differences with confidence intervals, wins and losses per query"
    )


@dataclass(kw_only=True)
class EncodeOptions(
    InstructionOptions, PoolingOptions, PrecisionOptions, TokenizerOptions, ModelOptions, CommonOptions
):
    """Encode rows of text into vectors, in the order of the input."""

    other_flags: ClassVar[tuple[Flag, ...]] = flagembedding.EMBEDDER

    model_name_or_path: str = flag(..., MODEL, "embedding model: folder or hub name", aliases=MODEL_NAMES)
    input_file: list[str] = flag(..., DATA, "rows of text: files, folders or globs")
    output_file: str = flag(
        ..., DATA, "X.parquet, X.npy (row i is the i-th row of the input), or a folder for several Parquet files"
    )
    text_field: str = flag("text", DATA, "field to encode")
    keep_fields: list[str] | None = flag(
        None, DATA, "fields written next to the vectors; default: the text, and `id` or `_id` if present"
    )
    kind: str = flag("passage", MODEL, "instruction to use: the query's or the passage's", choices=("query", "passage"))
    batch_size: int = flag(256, MODEL, "texts per encoding batch on a GPU", aliases=BATCH_SIZES)
    max_length: int | None = flag(None, MODEL, "maximum text length in tokens; default: the model's own")
    truncate_dim: int | None = flag(None, VECTORS, "number of leading dimensions to write; default: all")
    precision: str = flag(
        "float32",
        VECTORS,
        "number format of the output: one byte (int8, uint8) or one bit (binary, ubinary) per dimension",
        choices=("float32", "int8", "uint8", "binary", "ubinary"),
    )
    ranges: str | None = flag(
        None,
        VECTORS,
        "quantization ranges of int8 and uint8: a .npy file of shape (2, D), or the .meta.json of another output; "
        "default: minimum and maximum of the vectors",
    )
    overwrite: bool = flag(False, RUN, "replace an existing output_file")


# Flags of raybge.encode about files: a Ray Dataset replaces them.
FILE_FLAGS = (
    *("input_file", "output_file", "keep_fields", "on_bad_rows"),
    *("accept_any_text", "overwrite", "storage_path", "dry_run"),
)


@dataclass(kw_only=True)
class DemoOptions(CommonOptions):
    """Mine, fine-tune and evaluate a small model on the docstrings of installed packages."""

    output_dir: str = flag("runs/demo", RUN, "folder for text, model and summary.json, replaced by each run")
    seed: int = flag(42, RUN, "seed of every step")
