"""Flags of the commands that train, on top of transformers.TrainingArguments, and which of those cannot act here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raybge.cli.options.common import (
    DATA,
    LORA,
    LOSS,
    MODEL,
    POOLING,
    RUN,
    SCALE,
    SEARCH,
    VALIDATION,
    CommonOptions,
    ModelOptions,
)
from raybge.cli.parser import flag


@dataclass(kw_only=True)
class LoopOptions(ModelOptions, CommonOptions):
    """What every command that trains accepts."""

    model_name_or_path: str | None = flag(
        None, MODEL, "model to start from: folder or hub name", aliases=("embedder_name_or_path",)
    )
    train_data: list[str] = flag(..., DATA, "rows to train on: files, folders or globs")
    overwrite_output_dir: bool = flag(False, RUN, "train into an output folder that is not empty")
    resume: bool = flag(False, RUN, "continue the run of this output folder")
    num_workers: str | None = flag(
        None, SCALE, "workers, N, or MIN-MAX that come and go with the cluster; left out, it decides", metavar="N"
    )
    max_failures: int = flag(0, SCALE, "restarts from the last checkpoint after a lost worker (-1: no limit)")
    log_rows: bool = flag(False, RUN, "write down which rows each step trained, so that epochs can be checked")
    stall_timeout: float = flag(
        600.0, SCALE, "seconds that workers wait for one that does not come before that counts as a failure (0: off)"
    )
    max_bad_steps: int = flag(
        3, RUN, "steps in a row with a loss or gradient that is not finite, and so left out, that end the run (0: off)"
    )
    warmup_ratio: float = flag(0.0, RUN, "share of the steps over which the learning rate rises")
    logging_dir: str | None = flag(None, RUN, "TensorBoard's folder")

    config_name: str | None = flag(None, MODEL, "configuration, where it is not the model's own")
    tokenizer_name: str | None = flag(None, MODEL, "tokenizer, where it is not the model's own")
    token: str | None = flag(None, MODEL, "token for the hub; HF_TOKEN when left out")
    use_fast_tokenizer: bool = flag(True, MODEL, "use the tokenizer written in Rust")

    max_example_num_per_dataset: int = flag(100_000_000, DATA, "rows used of each data set")
    same_dataset_within_batch: bool = flag(False, DATA, "a step's rows come from one data set")
    small_threshold: int = flag(0, DATA, "data sets of a folder below this are joined")
    drop_threshold: int = flag(0, DATA, "joined data sets below this are left out")
    dataset_weights: list[str] | None = flag(
        None, DATA, "how often an epoch has each row of a file or folder: NAME=WEIGHT ...; 1 where not named"
    )
    global_batch_size: int | None = flag(
        None,
        LOSS,
        "rows of one step over all workers; left out: per_device_train_batch_size times the workers",
    )

    # Flags of transformers.TrainingArguments that were given, by name; `flags.py` reads their declarations.
    training: dict[str, Any] = field(default_factory=dict, metadata={"training_arguments": True})


@dataclass(kw_only=True)
class PretrainOptions(LoopOptions):
    """Pre-train an encoder for retrieval on raw text, with RetroMAE's objective."""

    train_data: list[str] = flag(..., DATA, "texts {text}: files, folders or globs")
    max_seq_length: int = flag(512, DATA, "longest text in tokens")
    encoder_mlm_probability: float = flag(0.3, LOSS, "share of the tokens that are masked for the encoder")
    decoder_mlm_probability: float = flag(0.5, LOSS, "share of the others that a position of the decoder does not see")
    pretrain_method: str = flag(
        "retromae", LOSS, "retromae, or dupmae, which adds a bag of words", choices=("retromae", "dupmae")
    )
    bow_loss_weight: float = flag(0.1, LOSS, "weight of dupmae's bag of words")


@dataclass(kw_only=True)
class TrainOptions(LoopOptions):
    """Fine-tune an embedding model on groups {query, pos, neg} with a contrastive objective."""

    model_name_or_path: str = flag(
        ..., MODEL, "model to start from: folder or hub name", aliases=("embedder_name_or_path",)
    )
    train_data: list[str] = flag(..., DATA, "groups {query, pos, neg}: files, folders or globs")

    pooling_method: str | None = flag(
        None, MODEL, "how token vectors become one", aliases=("sentence_pooling_method",), choices=POOLING
    )
    normalize_embeddings: bool | None = flag(None, MODEL, "scale vectors to length 1", aliases=("normlized",))
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
    query_max_len: int = flag(
        32,
        DATA,
        "longest query in tokens",
        aliases=("embedder_query_max_length", "query_max_length", "max_query_length"),
    )
    passage_max_len: int = flag(
        128,
        DATA,
        "longest passage in tokens",
        aliases=("embedder_passage_max_length", "passage_max_length", "max_passage_length"),
    )
    pad_to_multiple_of: int | None = flag(None, DATA, "pad to a multiple of this")
    query_instruction_for_retrieval: str | None = flag(None, DATA, "put before each query")
    query_instruction_format: str = flag(
        "{}{}", DATA, "how instruction and query are joined", aliases=("query_instruction_format_for_retrieval",)
    )
    passage_instruction_for_retrieval: str | None = flag(None, DATA, "put before each passage")
    passage_instruction_format: str = flag(
        "{}{}", DATA, "how instruction and passage are joined", aliases=("passage_instruction_format_for_retrieval",)
    )
    shuffle_ratio: float = flag(0.0, DATA, "share of positives above 100 characters whose three parts are shuffled")

    eval_data: list[str] | None = flag(
        None, VALIDATION, "queries with their answers {query, pos}: files, folders or globs"
    )
    eval_corpus: list[str] | None = flag(
        None, VALIDATION, "passages {text} to search; left out: every `pos` and `neg` of eval_data"
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


@dataclass(kw_only=True)
class TuneOptions(TrainOptions):
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
    "disable_tqdm": "workers have no console: raybge shows one bar for all of them",
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
