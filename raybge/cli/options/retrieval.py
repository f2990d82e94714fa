"""Flags of the commands that encode and search, and of those that chain commands."""

from __future__ import annotations

from dataclasses import dataclass

from raybge.cli.options.common import (
    DATA,
    METRICS,
    MINING,
    MODEL,
    POOLING,
    RUN,
    SCALE,
    TEACHER,
    VECTORS,
    CommonOptions,
    ModelOptions,
)
from raybge.cli.parser import flag


@dataclass(kw_only=True)
class MineOptions(ModelOptions, CommonOptions):
    """Find hard negatives: the passages that the model ranks high for a query and that are not its answers."""

    model_name_or_path: str | None = flag(
        None, MODEL, "embedding model: folder or hub name", aliases=("embedder_name_or_path",)
    )
    input_file: list[str] = flag(..., DATA, "groups {query, pos, neg}: files, folders or globs")
    output_file: str = flag(
        ..., DATA, "where the groups with their mined `neg` are written (.jsonl, .jsonl.gz, .jsonl.zst)"
    )
    corpus_data: list[str] | None = flag(
        None,
        DATA,
        "passages {text} to mine from; left out: every `pos` and `neg` of the input",
        aliases=("candidate_pool",),
    )
    range_for_sampling: str = flag(
        "10-210", MINING, "ranks lo-hi to sample from: 0-based, lo to hi-1 of the full ranking"
    )
    negative_number: int = flag(15, MINING, "negatives for each row")
    sampling_strategy: str = flag(
        "random", MINING, "which of what may be a negative: random ones, or the top", choices=("random", "top")
    )
    absolute_margin: float | None = flag(
        None, MINING, "a negative's score is below that of each positive by at least this"
    )
    relative_margin: float | None = flag(
        None, MINING, "the same as a share of the positive's score; 0.05 keeps what is below 95% of it"
    )
    max_score: float | None = flag(None, MINING, "the highest score of a negative")
    min_score: float | None = flag(None, MINING, "the lowest score of a negative")
    keep_scores: bool = flag(False, MINING, "write `pos_scores` and `neg_scores`")
    use_gpu_for_searching: bool = flag(False, MINING, "search with faiss on the GPU")
    search_batch_size: int = flag(64, MINING, "queries searched at a time")
    shard_size: int = flag(250_000, MINING, "passages in one faiss shard")
    shards_per_actor: int | None = flag(
        None, MINING, "shards that a search actor has in memory at a time; left out: what its memory carries"
    )
    index_factory: str = flag("Flat", MINING, "faiss index of each shard, such as IVF1024,Flat; Flat is exact")
    seed: int = flag(42, MINING, "seed of the sampling")
    cross_encoder: str | None = flag(
        None,
        TEACHER,
        "sequence classifier whose scores replace the embedding model's and are written: folder or hub name",
        aliases=("reranker_name_or_path",),
    )
    score_only: bool = flag(False, TEACHER, "mine nothing: give the rows their cross_encoder's scores")
    reranker_batch_size: int = flag(256, TEACHER, "pairs scored at a time on a GPU")
    reranker_max_length: int | None = flag(None, TEACHER, "longest pair in tokens")
    reranker_query_max_length: int | None = flag(None, TEACHER, "longest query in tokens")
    normalize_scores: bool = flag(False, TEACHER, "the sigmoid of the cross_encoder's output", aliases=("normalize",))
    overwrite: bool = flag(
        False, RUN, "mine anew although the output is there; what a storage_path keeps is still used"
    )
    query_instruction_for_retrieval: str | None = flag(None, MODEL, "put before each query")
    query_instruction_format: str = flag(
        "{}{}", MODEL, "how instruction and query are joined", aliases=("query_instruction_format_for_retrieval",)
    )
    passage_instruction_for_retrieval: str | None = flag(None, MODEL, "put before each passage")
    passage_instruction_format: str = flag(
        "{}{}", MODEL, "how instruction and passage are joined", aliases=("passage_instruction_format_for_retrieval",)
    )
    batch_size: int = flag(256, MODEL, "texts encoded at a time on a GPU")
    pooling_method: str | None = flag(
        None, MODEL, "how token vectors become one", aliases=("sentence_pooling_method",), choices=POOLING
    )
    normalize_embeddings: bool | None = flag(None, MODEL, "scale vectors to length 1", aliases=("normlized",))
    use_fp16: bool = flag(True, MODEL, "half precision; off on a CPU", aliases=("fp16",))
    query_max_len: int | None = flag(
        None,
        MODEL,
        "longest query in tokens",
        aliases=("embedder_query_max_length", "query_max_length", "max_query_length"),
    )
    passage_max_len: int | None = flag(
        None,
        MODEL,
        "longest passage in tokens",
        aliases=("embedder_passage_max_length", "passage_max_length", "max_passage_length"),
    )


@dataclass(kw_only=True)
class RecipeOptions(CommonOptions):
    """Mine, fine-tune, mine with the new model, fine-tune that, mix with the first model, measure before and after."""

    model_name_or_path: str = flag(..., MODEL, "embedding model to start from: folder or hub name")
    train_data: list[str] = flag(..., DATA, "groups {query, pos, neg}: files, folders or globs")
    corpus_data: list[str] = flag(..., DATA, "passages {text} to mine from and to search in when measuring")
    query_data: list[str] = flag(..., DATA, "held-out queries with their answers {query, pos}")
    output_dir: str = flag(..., RUN, "folder that all nodes share, for what each stage makes")
    seed: int = flag(42, RUN, "seed of every stage")
    max_failures: int = flag(0, SCALE, "restarts of training after a lost worker (-1: no limit)")


@dataclass(kw_only=True)
class EvaluateOptions(ModelOptions, CommonOptions):
    """Measure retrieval: exact search over a corpus, then MRR, nDCG, Recall and MAP."""

    model_name_or_path: str = flag(
        ..., MODEL, "embedding model: folder or hub name", aliases=("encoder", "embedder_name_or_path")
    )
    corpus_data: list[str] | None = flag(
        None, DATA, "passages {text} or {content}: files, folders or globs", aliases=("candidate_pool",)
    )
    query_data: list[str] | None = flag(None, DATA, "queries with their answers: {query, pos} or {query, positive}")
    mteb_tasks: list[str] | None = flag(None, DATA, "tasks of MTEB by name instead, with the data that they name")
    qrels: str | None = flag(
        None,
        DATA,
        "judgements of documents by id, in a TREC or BEIR file; queries and passages then have an _id. Left out for a "
        "BEIR folder: its qrels/test.tsv",
    )
    use_fp16: bool = flag(False, MODEL, "half precision; off on a CPU", aliases=("fp16",))
    add_instruction: bool = flag(
        False, MODEL, "put «Represent this sentence for searching relevant passages: » before each query"
    )
    pooling_method: str | None = flag(
        None, MODEL, "how token vectors become one", aliases=("sentence_pooling_method",), choices=POOLING
    )
    normalize_embeddings: bool | None = flag(None, MODEL, "scale vectors to length 1", aliases=("normlized",))
    query_max_len: int | None = flag(
        None,
        MODEL,
        "longest query in tokens; 32 where the model's folder does not say",
        aliases=("embedder_query_max_length", "query_max_length", "max_query_length"),
    )
    passage_max_len: int | None = flag(
        None,
        MODEL,
        "longest passage in tokens; 128 where the folder does not say",
        aliases=("embedder_passage_max_length", "passage_max_length", "max_passage_length"),
    )
    batch_size: int = flag(256, MODEL, "texts encoded at a time on a GPU")
    index_factory: str = flag("Flat", METRICS, "faiss index of each shard, such as IVF1024,Flat; Flat is exact")
    k: int = flag(100, METRICS, "passages retrieved for each query")
    save_embedding: bool = flag(False, METRICS, "keep the corpus embeddings at save_path")
    load_embedding: bool = flag(False, METRICS, "use the corpus embeddings at save_path")
    save_path: str = flag(
        "embeddings.memmap", METRICS, "file of the corpus embeddings, float32 behind a header of 4,096 bytes"
    )
    metrics_file: str | None = flag(None, METRICS, "write the metrics as JSON")
    run_file: str | None = flag(None, METRICS, "write what was found as a TREC run")
    compare: list[str] | None = flag(
        None, METRICS, "measure these models too: differences with confidence intervals, wins and losses by query"
    )
    search_batch_size: int = flag(64, METRICS, "queries searched at a time")
    shard_size: int = flag(250_000, METRICS, "passages in one faiss shard")
    shards_per_actor: int | None = flag(
        None, METRICS, "shards that a search actor has in memory at a time; left out: what its memory carries"
    )
    use_gpu_for_searching: bool = flag(False, METRICS, "search with faiss on the GPU")


@dataclass(kw_only=True)
class EncodeOptions(ModelOptions, CommonOptions):
    """Write the vectors of rows of text, in the input's order."""

    model_name_or_path: str = flag(
        ..., MODEL, "embedding model: folder or hub name", aliases=("embedder_name_or_path",)
    )
    input_file: list[str] = flag(..., DATA, "rows of text: files, folders or globs")
    output_file: str = flag(
        ..., DATA, "X.parquet, X.npy (row i is the input's i-th), or a folder, for Parquet files written side by side"
    )
    text_field: str = flag("text", DATA, "the field that is encoded")
    keep_fields: list[str] | None = flag(
        None, DATA, "fields written beside the vectors; left out: the text, and `id` or `_id` where there is one"
    )
    kind: str = flag("passage", MODEL, "whose instruction the texts get", choices=("query", "passage"))
    query_instruction_for_retrieval: str | None = flag(None, MODEL, "put before each query")
    query_instruction_format: str = flag(
        "{}{}", MODEL, "how instruction and query are joined", aliases=("query_instruction_format_for_retrieval",)
    )
    passage_instruction_for_retrieval: str | None = flag(None, MODEL, "put before each passage")
    passage_instruction_format: str = flag(
        "{}{}", MODEL, "how instruction and passage are joined", aliases=("passage_instruction_format_for_retrieval",)
    )
    batch_size: int = flag(256, MODEL, "texts encoded at a time on a GPU")
    max_length: int | None = flag(None, MODEL, "longest text in tokens")
    pooling_method: str | None = flag(
        None, MODEL, "how token vectors become one", aliases=("sentence_pooling_method",), choices=POOLING
    )
    normalize_embeddings: bool | None = flag(None, MODEL, "scale vectors to length 1", aliases=("normlized",))
    use_fp16: bool = flag(True, MODEL, "half precision; off on a CPU", aliases=("fp16",))
    truncate_dim: int | None = flag(None, VECTORS, "the first so many numbers of each vector alone")
    precision: str = flag(
        "float32",
        VECTORS,
        "of what is written: a byte a number (int8, uint8), or a bit (binary, ubinary)",
        choices=("float32", "int8", "uint8", "binary", "ubinary"),
    )
    ranges: str | None = flag(
        None,
        VECTORS,
        "ranges of int8 and uint8: a .npy of shape (2, D), or the .meta.json of another output; left out: those of "
        "the vectors themselves",
    )
    overwrite: bool = flag(False, RUN, "encode anew although the output is there")


@dataclass(kw_only=True)
class DemoOptions(CommonOptions):
    """Mine, fine-tune and evaluate a small model on the docstrings of installed packages."""

    output_dir: str = flag("runs/demo", RUN, "where text, model and summary.json are written; made anew each time")
    seed: int = flag(42, RUN, "seed of every step")
