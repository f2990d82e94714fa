"""Every flag of every command, declared once as dataclass fields; those of `raybge.merge` are in `merge_flags.py`.

Names and defaults are those of FlagEmbedding 1.4.2's scripts, so that its users can move over without relearning.
`None` as the default of pooling, normalising, instructions and lengths means «what the model's folder says».
How a declaration becomes a parser, a help page and a checked object is in `flags.py`. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raybge.flags import flag

SEARCH, MODEL, LORA, DATA, LOSS, VALIDATION, MINING, TEACHER, METRICS, VECTORS, RUN, SCALE = (
    "search",
    "model",
    "low-rank adaptation",
    "data",
    "objective",
    "evaluation while training",
    "mining",
    "cross-encoder",
    "evaluation",
    "vectors",
    "run",
    "workers and cluster",
)
POOLING = ("cls", "mean", "last_token")


@dataclass(kw_only=True)
class CommonArguments:
    """What every command that runs on Ray accepts."""

    num_workers: str | None = flag(None, SCALE, "workers, N or MIN-MAX; left out, the cluster decides", metavar="N")
    use_gpu: bool | None = flag(None, SCALE, "give each worker a GPU; left out, when the cluster has any")
    cpus_per_worker: int | None = flag(None, SCALE, "CPU cores, and threads, of each worker")
    storage_path: str | None = flag(None, SCALE, "shared folder or URI for what a run keeps between its processes")
    max_failures: int = flag(0, SCALE, "restarts after a lost worker (-1: no limit)", unbuilt=True)
    address: str | None = flag(
        None, SCALE, "Ray cluster to join; left out: RAY_ADDRESS, a live `ray start`, or this machine"
    )
    on_bad_rows: str = flag("stop", DATA, "what to do with rows that cannot be used", choices=("stop", "skip"))
    config: str | None = flag(None, RUN, "YAML file of flags; those on the command line override it")
    dry_run: bool = flag(False, RUN, "print the plan and stop")
    verbose: bool = flag(False, RUN, "leave the messages of Ray and transformers on the screen")


@dataclass(kw_only=True)
class ModelArguments:
    """How a model is found and opened."""

    cache_dir: str | None = flag(None, MODEL, "where models from the hub are kept")
    trust_remote_code: bool = flag(False, MODEL, "let the model's folder bring its own code")


@dataclass(kw_only=True)
class MineArguments(ModelArguments, CommonArguments):
    """Find hard negatives: the passages that the model ranks high for a query and that are not its answers."""

    model_name_or_path: str | None = flag(
        None, MODEL, "embedding model: folder or hub name", aliases=("embedder_name_or_path",)
    )
    input_file: list[str] = flag(..., DATA, "groups {query, pos, neg}: files, folders or globs")
    output_file: str = flag(
        ..., DATA, "where the groups with their mined `neg` are written (.jsonl, .jsonl.gz, .jsonl.zst)"
    )
    candidate_pool: list[str] | None = flag(
        None, DATA, "passages {text} to mine from; left out: every `pos` and `neg` of the input"
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
    query_instruction_format_for_retrieval: str = flag("{}{}", MODEL, "how instruction and query are joined")
    passage_instruction_for_retrieval: str | None = flag(None, MODEL, "put before each passage")
    passage_instruction_format_for_retrieval: str = flag("{}{}", MODEL, "how instruction and passage are joined")
    batch_size: int = flag(256, MODEL, "texts encoded at a time on a GPU")
    pooling_method: str | None = flag(None, MODEL, "how token vectors become one", choices=POOLING)
    normalize_embeddings: bool | None = flag(None, MODEL, "scale vectors to length 1", aliases=("normlized",))
    use_fp16: bool = flag(True, MODEL, "half precision; off on a CPU")
    embedder_query_max_length: int | None = flag(None, MODEL, "longest query in tokens")
    embedder_passage_max_length: int | None = flag(None, MODEL, "longest passage in tokens")


@dataclass(kw_only=True)
class RecipeArguments(CommonArguments):
    """Mine, fine-tune, mine with the new model, fine-tune that, mix with the first model, measure before and after."""

    model_name_or_path: str = flag(..., MODEL, "embedding model to start from: folder or hub name")
    train_data: list[str] = flag(..., DATA, "groups {query, pos, neg}: files, folders or globs")
    corpus_data: list[str] = flag(..., DATA, "passages {text} to mine from and to search in when measuring")
    query_data: list[str] = flag(..., DATA, "held-out queries with their answers {query, pos}")
    output_dir: str = flag(..., RUN, "folder that all nodes share, for what each stage makes")
    seed: int = flag(42, RUN, "seed of every stage")
    max_failures: int = flag(0, SCALE, "restarts of training after a lost worker (-1: no limit)")


@dataclass(kw_only=True)
class EvaluateArguments(ModelArguments, CommonArguments):
    """Measure retrieval: exact search over a corpus, then MRR, nDCG, Recall and MAP."""

    encoder: str = flag(..., MODEL, "embedding model: folder or hub name", aliases=("model_name_or_path",))
    corpus_data: list[str] | None = flag(None, DATA, "passages {text} or {content}: files, folders or globs")
    query_data: list[str] | None = flag(None, DATA, "queries with their answers: {query, pos} or {query, positive}")
    mteb_tasks: list[str] | None = flag(None, DATA, "tasks of MTEB by name instead, with the data that they name")
    qrels: str | None = flag(
        None,
        DATA,
        "judgements of documents by id, in a TREC or BEIR file; queries and passages then have an _id. Left out for a "
        "BEIR folder: its qrels/test.tsv",
    )
    fp16: bool = flag(False, MODEL, "half precision; off on a CPU")
    add_instruction: bool = flag(
        False, MODEL, "put «Represent this sentence for searching relevant passages: » before each query"
    )
    pooling_method: str | None = flag(None, MODEL, "how token vectors become one", choices=POOLING)
    normalize_embeddings: bool | None = flag(None, MODEL, "scale vectors to length 1", aliases=("normlized",))
    max_query_length: int | None = flag(
        None, MODEL, "longest query in tokens; 32 where the model's folder does not say"
    )
    max_passage_length: int | None = flag(None, MODEL, "longest passage in tokens; 128 where the folder does not say")
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
class EncodeArguments(ModelArguments, CommonArguments):
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
    query_instruction_format_for_retrieval: str = flag("{}{}", MODEL, "how instruction and query are joined")
    passage_instruction_for_retrieval: str | None = flag(None, MODEL, "put before each passage")
    passage_instruction_format_for_retrieval: str = flag("{}{}", MODEL, "how instruction and passage are joined")
    batch_size: int = flag(256, MODEL, "texts encoded at a time on a GPU")
    max_length: int | None = flag(None, MODEL, "longest text in tokens")
    pooling_method: str | None = flag(None, MODEL, "how token vectors become one", choices=POOLING)
    normalize_embeddings: bool | None = flag(None, MODEL, "scale vectors to length 1", aliases=("normlized",))
    use_fp16: bool = flag(True, MODEL, "half precision; off on a CPU")
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
class DemoArguments(CommonArguments):
    """Mine, fine-tune and evaluate a small model on the docstrings of installed packages."""

    output_dir: str = flag("runs/demo", RUN, "where text, model and summary.json are written; made anew each time")
    seed: int = flag(42, RUN, "seed of every step")


@dataclass(kw_only=True)
class TrainArguments(ModelArguments, CommonArguments):
    """Fine-tune an embedding model on groups {query, pos, neg} with a contrastive objective."""

    model_name_or_path: str = flag(
        ..., MODEL, "model to start from: folder or hub name", aliases=("embedder_name_or_path",)
    )
    train_data: list[str] = flag(..., DATA, "groups {query, pos, neg}: files, folders or globs")
    overwrite_output_dir: bool = flag(False, RUN, "train into an output folder that is not empty")
    resume: bool = flag(False, RUN, "continue the run of this output folder")
    max_failures: int = flag(0, SCALE, "restarts from the last checkpoint after a lost worker (-1: no limit)")
    warmup_ratio: float = flag(0.0, RUN, "share of the steps over which the learning rate rises")
    logging_dir: str | None = flag(None, RUN, "TensorBoard's folder")

    config_name: str | None = flag(None, MODEL, "configuration, where it is not the model's own")
    tokenizer_name: str | None = flag(None, MODEL, "tokenizer, where it is not the model's own")
    token: str | None = flag(None, MODEL, "token for the hub; HF_TOKEN when left out")
    use_fast_tokenizer: bool = flag(True, MODEL, "use the tokenizer written in Rust")
    sentence_pooling_method: str | None = flag(None, MODEL, "how token vectors become one", choices=POOLING)
    normlized: bool | None = flag(None, MODEL, "scale vectors to length 1", aliases=("normalize_embeddings",))
    fix_position_embedding: bool = flag(False, MODEL, "keep the position embeddings as they are")

    use_lora: bool = flag(False, LORA, "train low-rank adapters (peft) and leave the model's weights")
    lora_rank: int = flag(64, LORA, "rank of the adapters")
    lora_alpha: float = flag(16, LORA, "adapters are scaled by alpha / rank")
    lora_dropout: float = flag(0.1, LORA, "dropout in front of the adapters")
    target_modules: list[str] | None = flag(
        None, LORA, "names of the linear layers that get adapters; left out: all but embeddings and heads"
    )
    save_merged_lora_model: bool = flag(False, LORA, "save the whole model with the adapters added, not the adapters")

    train_group_size: int = flag(8, DATA, "passages of a group: one positive, the rest negatives")
    query_max_len: int = flag(32, DATA, "longest query in tokens")
    passage_max_len: int = flag(128, DATA, "longest passage in tokens")
    pad_to_multiple_of: int | None = flag(None, DATA, "pad to a multiple of this")
    query_instruction_for_retrieval: str | None = flag(None, DATA, "put before each query")
    query_instruction_format: str = flag("{}{}", DATA, "how instruction and query are joined")
    passage_instruction_for_retrieval: str | None = flag(None, DATA, "put before each passage")
    passage_instruction_format: str = flag("{}{}", DATA, "how instruction and passage are joined")
    max_example_num_per_dataset: int = flag(100_000_000, DATA, "rows used of each data set")
    same_dataset_within_batch: bool = flag(False, DATA, "a step's rows come from one data set")
    small_threshold: int = flag(0, DATA, "data sets of a folder below this are joined")
    drop_threshold: int = flag(0, DATA, "joined data sets below this are left out")
    shuffle_ratio: float = flag(0.0, DATA, "share of positives above 100 characters whose three parts are shuffled")

    dataset_weights: list[str] | None = flag(
        None, DATA, "how often an epoch has each row of a file or folder: NAME=WEIGHT ...; 1 where not named"
    )

    eval_data: list[str] | None = flag(
        None, VALIDATION, "queries with their answers {query, pos}: files, folders or globs"
    )
    eval_corpus: list[str] | None = flag(
        None, VALIDATION, "passages {text} to search; left out: every `pos` and `neg` of eval_data"
    )

    global_batch_size: int | None = flag(
        None,
        LOSS,
        "groups of one step over all workers; left out: per_device_train_batch_size times the workers",
    )
    temperature: float = flag(0.02, LOSS, "scores are divided by this")
    negatives_cross_device: bool = flag(True, LOSS, "take negatives from all workers' groups")
    use_inbatch_neg: bool = flag(True, LOSS, "take negatives from other groups at all")
    sub_batch_size: int | None = flag(None, LOSS, "texts whose activations are held at a time (-1: all)")
    knowledge_distillation: bool = flag(False, LOSS, "learn from pos_scores and neg_scores")
    kd_loss_type: str = flag("kl_div", LOSS, "how", choices=("kl_div", "m3_kd_loss"))
    use_mrl: bool = flag(False, LOSS, "train prefixes of the vector too")
    mrl_dims: list[int] | None = flag(None, LOSS, "their lengths")
    score_block: int | None = flag(None, LOSS, "passages scored at a time, so that no score matrix is ever whole")
    bidirectional: bool = flag(False, LOSS, "also find the query of each positive among all queries")
    mask_known_positives: bool = flag(
        True, LOSS, "a passage with the text of one of the query's positives is no negative"
    )
    false_negative_margin: float | None = flag(
        None, LOSS, "leave out negatives whose cosine is above the positive's minus this"
    )
    guide_model: str | None = flag(
        None, LOSS, "model that gives the cosines for the margin; left out: the one in training"
    )

    # Flags of transformers.TrainingArguments that were given, by name; `flags.py` reads their declarations.
    training: dict[str, Any] = field(default_factory=dict, metadata={"training_arguments": True})


@dataclass(kw_only=True)
class TuneArguments(TrainArguments):
    """Search training flags with Ray Tune: each trial is a training run, measured while it trains."""

    search: list[str] | None = flag(
        None,
        SEARCH,
        "what is searched: FLAG=uniform(lo,hi), loguniform, quniform, randint, lograndint, choice(a,b,...) or "
        "grid(a,b,...); left out: learning_rate=loguniform(1e-6,1e-4) temperature=uniform(0.01,0.1)",
    )
    num_samples: int = flag(8, SEARCH, "trials, or rounds over a grid")
    metric: str = flag("nDCG@10", SEARCH, "what trials are compared by", choices=("nDCG@10", "MRR@10"))
    mode: str = flag("max", SEARCH, "whether more of it is better", choices=("max", "min"))
    scheduler: str = flag(
        "asha",
        SEARCH,
        "who stops trials early: asha (successive halving), median (below the others' median), none; or pbt: after "
        "each quarter the worst go on from the best ones' checkpoints, with other flags",
        choices=("asha", "median", "pbt", "none"),
    )
    search_alg: str | None = flag(
        None,
        SEARCH,
        "who draws the values: optuna (TPE); hyperopt, bohb, where installed; random, which grids and pbt need",
        choices=("optuna", "hyperopt", "bohb", "random"),
    )
    max_concurrent: int | None = flag(None, SEARCH, "trials at a time; left out, as many as fit")
    time_budget: float | None = flag(None, SEARCH, "seconds after which no trial goes on")
    mine_config: str | None = flag(
        None,
        SEARCH,
        "YAML file of raybge.mine's flags: each trial first mines the negatives of train_data with them, from vectors "
        "that are kept, and they can be searched too",
    )
    held_out: float = flag(0.05, SEARCH, "without eval_data: share of the groups that is kept to measure on")


_OWN_READING = "Ray Data reads and tokenises, in the same order for any number of workers"
_RETRIEVAL = "evaluation is retrieval (nDCG@10, MRR@10 over --eval_data): there are no predictions to gather"
_HUB = "workers hold no login; push the finished folder with `hf upload REPO_ID OUTPUT_DIR`"

# The TrainingArguments that cannot act here, each with its reason: giving one stops the command, none is silently
# ignored. All others go to the Trainer; `training_flags.py` says what else it needs to know of them.
REFUSED: dict[str, str] = {
    "average_tokens_across_devices": "the loss is a mean over groups, not over tokens",
    "label_smoothing_factor": "there are no class labels to smooth: a query's target is its positive",
    "label_names": "there are no labels: a query's target is its positive",
    "bf16_full_eval": "the model is measured while it trains, and transformers then keeps the training's precision",
    "fp16_full_eval": "the model is measured while it trains, and transformers then keeps the training's precision",
    "use_liger_kernel": "Liger's kernels replace a language model's layers and its loss",
    "liger_kernel_config": "Liger's kernels replace a language model's layers and its loss",
    "auto_find_batch_size": "the batch is part of the objective; lower --sub_batch_size instead",
    "disable_tqdm": "workers have no screen: raybge shows one bar for all of them",
    "prediction_loss_only": _RETRIEVAL,
    "eval_do_concat_batches": _RETRIEVAL,
    "eval_use_gather_object": _RETRIEVAL,
    "eval_accumulation_steps": _RETRIEVAL,
    "include_for_metrics": _RETRIEVAL,
    "batch_eval_metrics": _RETRIEVAL,
    "do_predict": "measure the finished model with raybge.evaluate",
    "save_on_each_node": "checkpoints lie in one folder that all nodes share",
    "enable_jit_checkpoint": "Ray Train runs the loop in a thread, where SIGTERM is not heard",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "ignore_data_skip": "a resumed run starts reading at its position, without reading what came before",
    "restore_callback_states_from_checkpoint": "no callback of a run has a state",
    "parallelism_config": "training is data-parallel; large models are sharded with --fsdp or --deepspeed",
    "dataloader_num_workers": _OWN_READING,
    "dataloader_pin_memory": _OWN_READING,
    "dataloader_persistent_workers": _OWN_READING,
    "dataloader_prefetch_factor": _OWN_READING,
    "dataloader_multiprocessing_context": _OWN_READING,
    "dataloader_in_order": _OWN_READING,
    "remove_unused_columns": _OWN_READING,
    "train_sampling_strategy": _OWN_READING,
    "length_column_name": "each step is sorted by length anyway",
    "local_rank": "Ray Train gives each worker its rank",
}
