"""Options of the commands that train, in addition to transformers.TrainingArguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from raybge.cli.flag import Flag, flag
from raybge.cli.options import flagembedding
from raybge.cli.options.common import (
    DATA,
    LORA,
    MODEL,
    MODEL_NAMES,
    OBJECTIVE,
    PASSAGE_LENGTHS,
    QUERY_LENGTHS,
    RUN,
    SCALE,
    TRIALS,
    VALIDATION,
    CommonOptions,
    InstructionOptions,
    ModelOptions,
    PoolingOptions,
    TokenizerOptions,
)

# Flags that most runs set, in the order of the help page, each with a text of one line.
_REQUIRED_FLAGS = {
    "model_name_or_path": "model to start from: a folder, or a name on the hub",
    "train_data": "training rows: files, folders or globs",
    "output_dir": "folder of the trained model, its checkpoints and its report",
}
_OPTIMIZATION_FLAGS = {
    "learning_rate": "highest learning rate",
    "num_train_epochs": "passes over the data",
    "max_steps": "updates, in place of epochs",
    "per_device_train_batch_size": "rows of a step for each worker",
    "global_batch_size": "rows of a step over all workers, however many there are",
    "gradient_accumulation_steps": "steps of one update",
    "gradient_checkpointing": "save memory: the backward pass computes activations again",
    "bf16": "bf16: on GPUs since Ampere, and on CPUs that gain by it",
    "fp16": "fp16: on older GPUs",
    "warmup_ratio": "share of the updates in which the learning rate rises from 0",
    "lr_scheduler_type": "course of the rate: linear, cosine, constant, ...",
}
_OBJECTIVE_FLAGS = {
    "sub_batch_size": "texts whose activations are in memory at a time; default: all",
    "temperature": "divisor of the similarities; smaller is sharper",
    "train_group_size": "passages of a row: one positive, the rest negatives",
    "query_max_len": "longest query in tokens",
    "passage_max_len": "longest passage in tokens",
    "eval_data": "queries with answers that are evaluated while training",
    "eval_strategy": "when to evaluate: no, steps or epoch",
    "eval_steps": "updates between two evaluations",
}
_RUN_FLAGS = {
    "save_steps": "updates between two checkpoints",
    "save_total_limit": "checkpoints to keep; default: all",
    "logging_steps": "updates between two records of the loss",
    "resume": "continue the run in output_dir",
    "seed": "seed of the order of the rows and of all random numbers",
    "num_workers": "workers: N, or MIN-MAX if they may come and go; default: all that fit",
}


@dataclass(kw_only=True)
class LoopOptions(TokenizerOptions, ModelOptions, CommonOptions):
    """Options of every command that trains."""

    model_name_or_path: str | None = flag(None, MODEL, "model to start from: folder or hub name", aliases=MODEL_NAMES)
    train_data: list[str] = flag(..., DATA, "training rows: files, folders or globs")
    overwrite_output_dir: bool = flag(
        False, RUN, "allow an output_dir that is not empty: delete its checkpoints and replace its results"
    )
    storage_path: str | None = flag(None, SCALE, "shared folder or URI for checkpoints; default: output_dir")
    cache_path: str | None = flag(
        None, SCALE, "shared folder for the counts of rows and for decompressed files; default: in storage_path"
    )
    resume: bool = flag(False, RUN, "continue the run in output_dir")
    num_workers: str | None = flag(
        None,
        SCALE,
        "number of workers N, or MIN-MAX for an elastic run; default: as many as the cluster fits",
        metavar="N",
    )
    max_failures: int = flag(0, SCALE, "restarts from the last checkpoint after a worker failed (-1: no limit)")
    log_rows: bool = flag(False, RUN, "log the rows of each step, so that epochs can be verified")
    stall_timeout: float = flag(
        600.0, SCALE, "restart if a worker makes no progress for this many seconds while others wait for it (0: off)"
    )
    max_bad_steps: int = flag(
        3, RUN, "stop the run after this many consecutive steps with a non-finite loss or gradient (0: never)"
    )
    ema: float | None = flag(
        None,
        RUN,
        "save the exponential moving average of the weights over the updates, with this decay: 0.99 to 0.9999",
    )
    average_checkpoints: int | None = flag(
        None, OBJECTIVE, "save the mean of the weights of this many last checkpoints"
    )
    warmup_ratio: float = flag(0.0, RUN, "share of the steps for learning-rate warm-up")
    logging_dir: str | None = flag(None, RUN, "TensorBoard folder")
    license: str | None = flag(
        None, RUN, "license of the trained model for its card, such as apache-2.0; default: the base model's"
    )
    language: list[str] | None = flag(
        None, RUN, "languages of the texts for the model card, such as en de; default: the base model's"
    )

    config_name: str | None = flag(None, MODEL, "model configuration; default: the model's own")
    tokenizer_name: str | None = flag(None, MODEL, "tokenizer; default: the model's own")
    token: str | None = flag(None, MODEL, "access token for the hub; default: HF_TOKEN")
    use_fast_tokenizer: bool = flag(True, MODEL, "use the tokenizer implemented in Rust")

    max_example_num_per_dataset: int = flag(100_000_000, DATA, "maximum rows per data set")
    same_dataset_within_batch: bool = flag(
        False, DATA, "take all rows of a step from one data set", aliases=("same_task_within_batch",)
    )
    small_threshold: int = flag(0, DATA, "join data sets of a folder with fewer rows than this")
    drop_threshold: int = flag(0, DATA, "drop joined data sets with fewer rows than this")
    dataset_weights: list[str] | None = flag(
        None, DATA, "sampling weight of a file's or folder's rows per epoch: NAME=WEIGHT ...; default: 1"
    )
    global_batch_size: int | None = flag(
        None, OBJECTIVE, "rows per step over all workers; default: per_device_train_batch_size times the workers"
    )

    # Values of transformers.TrainingArguments that were set, by name; cli/training_arguments.py reads the declarations.
    training: dict[str, Any] = field(default_factory=dict, metadata={"training_arguments": True})


@dataclass(kw_only=True)
class PretrainOptions(LoopOptions):
    """Pre-train an encoder for retrieval on raw text with RetroMAE."""

    common_flags: ClassVar[dict[str, str]] = _REQUIRED_FLAGS | _OPTIMIZATION_FLAGS | _RUN_FLAGS

    train_data: list[str] = flag(..., DATA, "texts {text}: files, folders or globs")
    max_seq_length: int = flag(512, DATA, "maximum text length in tokens")
    encoder_mlm_probability: float = flag(0.3, OBJECTIVE, "share of tokens masked for the encoder")
    decoder_mlm_probability: float = flag(
        0.5, OBJECTIVE, "share of the other tokens hidden from each position of the decoder"
    )
    pretrain_method: str = flag(
        "retromae", OBJECTIVE, "dupmae adds a bag-of-words loss to retromae", choices=("retromae", "dupmae")
    )
    bow_loss_weight: float = flag(0.1, OBJECTIVE, "weight of dupmae's bag-of-words loss")


@dataclass(kw_only=True)
class TrainOptions(InstructionOptions, PoolingOptions, LoopOptions):
    """Fine-tune an embedding model on groups {query, pos, neg} with a contrastive objective."""

    common_flags: ClassVar[dict[str, str]] = _REQUIRED_FLAGS | _OPTIMIZATION_FLAGS | _OBJECTIVE_FLAGS | _RUN_FLAGS

    model_name_or_path: str = flag(..., MODEL, "model to start from: folder or hub name", aliases=MODEL_NAMES)
    train_data: list[str] = flag(..., DATA, "groups {query, pos, neg}: files, folders or globs")
    other_flags: ClassVar[tuple[Flag, ...]] = flagembedding.TRAINING

    fix_position_embedding: bool = flag(False, MODEL, "freeze the position embeddings")

    use_lora: bool = flag(False, LORA, "train low-rank adapters (peft) and freeze the model's weights")
    lora_rank: int = flag(64, LORA, "rank of the adapters")
    lora_alpha: float = flag(16, LORA, "scale of the adapters: alpha / rank")
    lora_dropout: float = flag(0.1, LORA, "dropout before the adapters")
    target_modules: list[str] | None = flag(
        None, LORA, "names of the linear layers with adapters; default: all but embeddings and heads"
    )
    save_merged_lora_model: bool = flag(False, LORA, "save the model with merged adapters in place of the adapters")

    train_group_size: int = flag(8, DATA, "passages per group: one positive, the rest negatives")
    query_max_len: int = flag(32, DATA, "maximum query length in tokens", aliases=QUERY_LENGTHS)
    passage_max_len: int = flag(128, DATA, "maximum passage length in tokens", aliases=PASSAGE_LENGTHS)
    pad_to_multiple_of: int | None = flag(None, DATA, "pad sequences to a multiple of this")
    shuffle_ratio: float = flag(0.0, DATA, "share of positives above 100 characters whose three parts are shuffled")

    eval_data: list[str] | None = flag(
        None, VALIDATION, "queries with their answers {query, pos}: files, folders or globs"
    )
    eval_corpus: list[str] | None = flag(
        None,
        VALIDATION,
        "passages {text} to search in; default: every `pos` and `neg` of eval_data",
        aliases=("corpus_path",),
    )

    keep_better: bool = flag(
        False, VALIDATION, "with --ema or --average_checkpoints: save the last weights if they are the better ones"
    )

    batch_by: str = flag(
        "random",
        DATA,
        "rows of a step: random ones, or groups with similar queries (similarity), whose passages are hard negatives "
        "of each other",
        choices=("random", "similarity"),
    )
    batch_clusters: int | None = flag(
        None,
        DATA,
        "clusters of queries for --batch_by similarity; default: one for 8 global batches, at least 2, at most 2,048",
    )
    batch_vectors: str | None = flag(
        None,
        DATA,
        "vectors of the queries for --batch_by similarity: the .npy file that raybge.encode --kind query --text_field "
        "query makes of train_data; default: the model encodes the queries before training",
    )

    temperature: float = flag(0.02, OBJECTIVE, "divisor of the scores")
    negatives_cross_device: bool = flag(True, OBJECTIVE, "use the groups of all workers as negatives")
    use_inbatch_neg: bool = flag(True, OBJECTIVE, "use the passages of other groups as negatives")
    sub_batch_size: int | None = flag(None, OBJECTIVE, "texts whose activations are held in memory at a time (-1: all)")
    sub_batch_tokens: int | None = flag(
        None, OBJECTIVE, "tokens, padding included, whose activations are held in memory at a time"
    )
    knowledge_distillation: bool = flag(False, OBJECTIVE, "distill from pos_scores and neg_scores")
    kd_loss_type: str = flag(
        "kl_div",
        OBJECTIVE,
        "distillation loss; m3_kd_loss replaces the contrastive loss, soft_labels gives it several targets, the others "
        "are added to it",
        choices=("kl_div", "m3_kd_loss", "margin_mse", "score_mse", "cosent", "soft_labels"),
    )
    teacher_temperature: float = flag(1.0, OBJECTIVE, "divisor of the teacher scores")
    contrastive_weight: float = flag(
        1.0, OBJECTIVE, "factor of the contrastive loss to which a distillation loss is added (0: distillation alone)"
    )
    score_bands: list[str] | None = flag(
        None,
        OBJECTIVE,
        "label of a passage by its teacher score for soft_labels: BOUND=LABEL ..., that of the highest bound reached; "
        "0 below all",
    )
    use_mrl: bool = flag(False, OBJECTIVE, "Matryoshka loss: train prefixes of the embedding as well")
    mrl_dims: list[int] | None = flag(None, OBJECTIVE, "Matryoshka dimensions, for example 64 128")
    score_block: int | None = flag(
        None, OBJECTIVE, "passages scored at a time, to bound the memory of the score matrix"
    )
    directions: list[str] | None = flag(
        None,
        OBJECTIVE,
        "comparisons in the loss: query_to_doc (the default), doc_to_query, query_to_query, doc_to_doc; all four are "
        "the loss of GTE, all but doc_to_query that of Qwen3-Embedding",
        choices=("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"),
        metavar="DIRECTION",
    )
    partition_mode: str = flag(
        "joint", OBJECTIVE, "one softmax over all directions, or one for each", choices=("joint", "per_direction")
    )
    bidirectional: bool = flag(
        False, OBJECTIVE, "short for --directions query_to_doc doc_to_query --partition_mode per_direction"
    )
    hardness_mode: str | None = flag(
        None,
        OBJECTIVE,
        "negatives that count the more, the closer they are to the query; default: none",
        choices=("in_batch_negatives", "hard_negatives", "all_negatives"),
    )
    hardness_strength: float | None = flag(
        None, OBJECTIVE, "weight exp(strength * cosine) of a negative; default: 9 for in_batch_negatives, else 5"
    )
    hardness_normalize: bool = flag(False, OBJECTIVE, "scale the weights of a query's negatives to mean 1 (Robinson)")
    mask_known_positives: bool = flag(
        True,
        OBJECTIVE,
        "exclude passages with the text of one of the query's positives from its negatives, and equal queries",
    )
    false_negative_margin: float | None = flag(
        None,
        OBJECTIVE,
        "exclude negatives whose cosine is above the positive's minus this margin; default: none, and 0 with "
        "--batch_by similarity (-2: none)",
    )
    guide_model: str | None = flag(
        None, OBJECTIVE, "model that computes the cosines for the margin; default: the model in training"
    )


@dataclass(kw_only=True)
class TuneOptions(TrainOptions):
    """Search training flags with Ray Tune: each trial is a training run, evaluated during training."""

    search: list[str] | None = flag(
        None,
        TRIALS,
        "search space: FLAG=uniform(lo,hi), loguniform, quniform, randint, lograndint, choice(a,b,...) or "
        "grid(a,b,...); default: learning_rate=loguniform(1e-6,1e-4) temperature=uniform(0.01,0.1)",
    )
    num_samples: int = flag(8, TRIALS, "number of trials, or of repetitions of a grid")
    metric: str = flag("nDCG@10", TRIALS, "metric that ranks the trials", choices=("nDCG@10", "MRR@10"))
    mode: str = flag("max", TRIALS, "maximize or minimize the metric", choices=("max", "min"))
    scheduler: str = flag(
        "asha",
        TRIALS,
        "early stopping: asha (successive halving), median (below the others' median), none; or pbt (population based "
        "training): after each quarter the worst trials continue from the best ones' checkpoints with other flags",
        choices=("asha", "median", "pbt", "none"),
    )
    search_alg: str | None = flag(
        None,
        TRIALS,
        "search algorithm: optuna (TPE); hyperopt or bohb if installed; random, required by grids and pbt",
        choices=("optuna", "hyperopt", "bohb", "random"),
    )
    max_concurrent: int | None = flag(None, TRIALS, "maximum concurrent trials; default: as many as the cluster fits")
    time_budget: float | None = flag(None, TRIALS, "seconds after which all trials stop")
    mine_config: str | None = flag(
        None,
        TRIALS,
        "YAML file of raybge.mine flags: each trial first mines the negatives of train_data with them, reusing the "
        "vectors of earlier trials; they can be searched as well, as mine.FLAG where training has a flag of that name",
    )
    storage_path: str | None = flag(
        None, SCALE, "shared folder for held-out groups and reused vectors; default: in output_dir"
    )
    held_out: float = flag(0.05, TRIALS, "share of the groups held out for evaluation if eval_data is unset")


_OWN_READING = "Ray Data reads and tokenizes, in the same order for any number of workers"
_RETRIEVAL = "evaluation is retrieval (nDCG@10, MRR@10 on --eval_data): there are no predictions to gather"
_HUB = "workers have no hub login; the run ends with the command that uploads the model's files"

# TrainingArguments that cannot be used here, each with the reason: setting one stops the command.
# All others reach the Trainer through training/trainer_arguments.py.
REFUSED: dict[str, str] = {
    "average_tokens_across_devices": "the loss is a mean over groups, not over tokens",
    "label_smoothing_factor": "there are no class labels to smooth: a query's target is its positive",
    "label_names": "there are no labels: a query's target is its positive",
    "bf16_full_eval": "the model is evaluated during training, where transformers keeps the training precision",
    "fp16_full_eval": "the model is evaluated during training, where transformers keeps the training precision",
    "use_liger_kernel": "Liger kernels replace the layers and the loss of language models",
    "liger_kernel_config": "Liger kernels replace the layers and the loss of language models",
    "auto_find_batch_size": "the batch is part of the objective; lower --sub_batch_size to save memory",
    "disable_tqdm": "workers have no terminal: raybge shows one progress bar for all of them",
    "prediction_loss_only": _RETRIEVAL,
    "eval_do_concat_batches": _RETRIEVAL,
    "eval_use_gather_object": _RETRIEVAL,
    "eval_accumulation_steps": _RETRIEVAL,
    "include_for_metrics": _RETRIEVAL,
    "batch_eval_metrics": _RETRIEVAL,
    "do_predict": "evaluate the finished model with raybge.evaluate",
    "save_on_each_node": "checkpoints are saved to one folder that all nodes share",
    "enable_jit_checkpoint": "Ray Train runs the loop in a thread, which receives no SIGTERM",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "ignore_data_skip": "a resumed run starts reading at its position, without reading earlier rows",
    "restore_callback_states_from_checkpoint": "no callback of a run has state",
    "parallelism_config": "training is data-parallel; large models are sharded with --fsdp or --deepspeed",
    "dataloader_multiprocessing_context": _OWN_READING,
    "dataloader_in_order": _OWN_READING,
    "train_sampling_strategy": _OWN_READING,
    "length_column_name": "each step is sorted by length in any case",
    "local_rank": "Ray Train sets the rank of each worker",
}

# TrainingArguments that change the speed of the Trainer's own reading and nothing else, so that commands with them run
# here too: each prints a line.
NO_EFFECT: dict[str, str] = dict.fromkeys(
    (
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "remove_unused_columns"),
    ),
    _OWN_READING,
)
