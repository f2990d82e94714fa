"""Options that several commands share, and the groups of the help page."""

from __future__ import annotations

from dataclasses import dataclass

from raybge.cli.flag import flag

# In the order of the help page.
MODEL = "model"
LORA = "low-rank adaptation"
DATA = "data"
OBJECTIVE = "objective"
TRIALS = "search of training flags"
VALIDATION = "evaluation during training"
MINING = "mining"
CROSS_ENCODER = "cross-encoder"
RELABELLING = "relabelling"
METRICS = "evaluation"
INDEX = "vector search"
VECTORS = "vectors"
MERGE = "merge"
EXAMPLES = "weights from examples"
WEIGHT_SEARCH = "weights from a search"
RUN = "run"
SCALE = "workers and cluster"
FLAGEMBEDDING = "other flags of FlagEmbedding"
GROUPS = (
    *(MODEL, LORA, DATA, OBJECTIVE, TRIALS, VALIDATION, MINING, CROSS_ENCODER, RELABELLING, METRICS, INDEX, VECTORS),
    *(MERGE, EXAMPLES, WEIGHT_SEARCH, RUN, SCALE, FLAGEMBEDDING),
)
POOLING = ("cls", "mean", "last_token")

# FlagEmbedding names the same length differently in each of its scripts.
QUERY_LENGTHS = ("embedder_query_max_length", "query_max_length", "max_query_length", "retriever_query_max_length")
PASSAGE_LENGTHS = (
    *("embedder_passage_max_length", "passage_max_length", "max_passage_length"),
    "retriever_passage_max_length",
)
MODEL_NAMES = ("embedder_name_or_path", "encoder")
BATCH_SIZES = ("embedder_batch_size", "encode_batch_size", "retriever_batch_size")


@dataclass(kw_only=True)
class CommonOptions:
    """Options of every command that runs on Ray."""

    num_workers: str | None = flag(None, SCALE, "number of workers; default: as many as the cluster fits", metavar="N")
    use_gpu: bool | None = flag(None, SCALE, "one GPU per worker; default: True if the cluster has GPUs")
    cpus_per_worker: int | None = flag(None, SCALE, "CPU cores and threads per worker")
    storage_path: str | None = flag(
        None, SCALE, "shared folder or URI for intermediate results, which an interrupted run reuses"
    )
    max_failures: int = flag(
        0,
        SCALE,
        "restarts after the loss of a worker (-1: no limit)",
        refused="restarts are for training; other commands reuse the results in --storage_path when started again",
    )
    address: str | None = flag(
        None, SCALE, "address of the Ray cluster; default: RAY_ADDRESS, a running `ray start`, or a local Ray"
    )
    on_bad_rows: str = flag("stop", DATA, "stop at invalid rows or skip them", choices=("stop", "skip"))
    accept_any_text: bool = flag(
        False, DATA, 'take "None", "nan" or "[\'a\', \'b\']" for texts: without it rows with such texts are invalid'
    )
    config: str | None = flag(None, RUN, "YAML file of flags; flags on the command line override it")
    dry_run: bool = flag(False, RUN, "print the plan and exit")
    verbose: bool = flag(False, RUN, "show the messages of Ray and transformers")


@dataclass(kw_only=True)
class ModelOptions:
    """Options for loading a model."""

    cache_dir: str | None = flag(None, MODEL, "cache folder for models from the hub")
    trust_remote_code: bool = flag(False, MODEL, "allow code from the model's folder to run")


@dataclass(kw_only=True)
class TokenizerOptions:
    """Options for the tokenizer of a model that reads texts."""

    allow_unknown_tokens: bool = flag(
        False, MODEL, "go on if the tokenizer does not know more than half of the words of a sample of the data"
    )


@dataclass(kw_only=True)
class PoolingOptions:
    """Options that turn token vectors into one embedding."""

    pooling_method: str | None = flag(
        None,
        MODEL,
        "pooling of the token vectors; default: the model's own",
        aliases=("sentence_pooling_method",),
        choices=POOLING,
    )
    normalize_embeddings: bool | None = flag(
        None, MODEL, "scale embeddings to length 1; default: the model's own setting", aliases=("normlized",)
    )


@dataclass(kw_only=True)
class InstructionOptions:
    """Options for instructions in front of queries and passages."""

    query_instruction_for_retrieval: str | None = flag(
        None, MODEL, "instruction in front of each query; default: the model's own prompt"
    )
    query_instruction_format: str = flag(
        "{}{}",
        MODEL,
        "format of instruction and query",
        aliases=("query_instruction_format_for_retrieval",),
    )
    passage_instruction_for_retrieval: str | None = flag(
        None, MODEL, "instruction in front of each passage; default: the model's own prompt"
    )
    passage_instruction_format: str = flag(
        "{}{}",
        MODEL,
        "format of instruction and passage",
        aliases=("passage_instruction_format_for_retrieval",),
    )


BACKENDS, PRECISIONS = ("torch", "onnx", "openvino"), ("fp32", "bf16", "int8")
FP16_TEXT = "half precision on GPUs; CPUs use fp32, or bf16 with --use_bf16"


@dataclass(kw_only=True)
class PrecisionOptions:
    """Options for the precision of a model that is not trained."""

    use_fp16: bool = flag(True, MODEL, FP16_TEXT, aliases=("fp16",))
    use_bf16: bool = flag(
        False,
        MODEL,
        "bf16: on GPUs in place of fp16, in place of fp32 on CPUs that gain by it (with AMX)",
        aliases=("bf16",),
    )
    encode_backend: str = flag(
        "torch", MODEL, "library that runs the model; onnx and openvino run it on CPUs, exported once", choices=BACKENDS
    )
    encode_precision: str | None = flag(
        None,
        MODEL,
        "precision of encoding, in place of use_fp16; bf16 is use_bf16, int8 requires onnx or openvino",
        choices=PRECISIONS,
    )


@dataclass(kw_only=True)
class IndexOptions:
    """Options of the sharded faiss index."""

    use_gpu_for_searching: bool | None = flag(
        None, INDEX, "search with faiss on GPUs; default: if the cluster has both and the index is exact"
    )
    search_batch_size: int | None = flag(None, INDEX, "queries per search batch; default: 64, on GPUs 1,024")
    shard_size: int = flag(250_000, INDEX, "passages per faiss shard")
    shards_per_actor: int | None = flag(
        None, INDEX, "shards that a search actor holds in memory; default: as many as its memory fits"
    )
    index_factory: str = flag("Flat", INDEX, "faiss index of each shard, for example IVF1024,Flat; Flat is exact")
