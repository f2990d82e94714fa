"""Types and defaults of keyword arguments: `make signatures` writes this file from the options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Required, TypedDict


class TrainingArgumentKeywords(TypedDict, total=False):
    """Keyword arguments of transformers.TrainingArguments."""

    output_dir: Required[str | Path]
    per_device_train_batch_size: int  # 8
    num_train_epochs: float  # 3.0
    max_steps: int  # -1
    learning_rate: float  # 5e-05
    lr_scheduler_type: str | Path  # 'linear'
    lr_scheduler_kwargs: dict[str, Any] | str | Path | None
    warmup_steps: float  # 0
    optim: str | Path | None
    optim_args: str | Path | None
    weight_decay: float  # 0.0
    adam_beta1: float  # 0.9
    adam_beta2: float  # 0.999
    adam_epsilon: float  # 1e-08
    optim_target_modules: str | Path | Sequence[str | Path] | None
    gradient_accumulation_steps: int  # 1
    max_grad_norm: float  # 1.0
    bf16: bool  # False
    fp16: bool  # False
    tf32: bool | None
    activation_checkpointing: bool | None
    activation_checkpointing_kwargs: dict[str, Any] | str | Path | None
    gradient_checkpointing: bool | None
    gradient_checkpointing_kwargs: dict[str, Any] | str | Path | None
    torch_compile: bool  # False
    torch_compile_backend: str | Path | None
    torch_compile_mode: str | Path | None
    use_cache: bool  # False
    neftune_noise_alpha: float | None
    torch_empty_cache_steps: int | None
    logging_strategy: str | Path  # 'steps'
    logging_steps: float  # 500
    logging_first_step: bool  # False
    log_on_each_node: bool  # True
    logging_nan_inf_filter: bool  # True
    include_num_input_tokens_seen: str | Path  # 'no'
    log_level: str | Path  # 'passive'
    log_level_replica: str | Path  # 'warning'
    report_to: str | Path | Sequence[str | Path]  # 'none'
    run_name: str | Path | None
    project: str | Path  # 'huggingface'
    trackio_space_id: str | Path | None
    trackio_bucket_id: str | Path | None
    trackio_static_space_id: str | Path | None
    eval_strategy: str | Path  # 'no'
    eval_steps: float | None
    eval_delay: float  # 0
    per_device_eval_batch_size: int  # 8
    eval_on_start: bool  # False
    save_only_model: bool  # False
    save_strategy: str | Path  # 'steps'
    save_steps: float  # 500
    save_total_limit: int | None
    load_best_model_at_end: bool  # False
    metric_for_best_model: str | Path | None
    greater_is_better: bool | None
    full_determinism: bool  # False
    seed: int  # 42
    data_seed: int | None
    use_cpu: bool  # False
    accelerator_config: dict[str, Any] | str | Path | None
    dataloader_drop_last: bool  # False
    ddp_find_unused_parameters: bool | None
    ddp_bucket_cap_mb: int | None
    ddp_broadcast_buffers: bool | None
    ddp_static_graph: bool | None
    ddp_backend: str | Path | None
    ddp_timeout: int  # 1800
    fsdp: str | Path | None
    fsdp_config: dict[str, Any] | str | Path | None
    deepspeed: dict[str, Any] | str | Path | None
    debug: str | Path  # ''
    skip_memory_metrics: bool  # True
    do_train: bool  # False
    do_eval: bool  # False
    resume_from_checkpoint: str | Path | None


class TrainKeywords(TrainingArgumentKeywords, total=False):
    """Keyword arguments of raybge.finetune."""

    model_name_or_path: Required[str | Path]
    train_data: Required[str | Path | Sequence[str | Path]]
    cache_dir: str | Path | None
    trust_remote_code: bool  # False
    allow_unknown_tokens: bool  # False
    config_name: str | Path | None
    tokenizer_name: str | Path | None
    token: str | Path | None
    use_fast_tokenizer: bool  # True
    pooling_method: Literal["cls", "mean", "last_token", None]
    normalize_embeddings: bool | None
    query_instruction_for_retrieval: str | Path | None
    query_instruction_format: str | Path  # '{}{}'
    passage_instruction_for_retrieval: str | Path | None
    passage_instruction_format: str | Path  # '{}{}'
    fix_position_embedding: bool  # False
    use_lora: bool  # False
    lora_rank: int  # 64
    lora_alpha: float  # 16
    lora_dropout: float  # 0.1
    target_modules: str | Path | Sequence[str | Path] | None
    save_merged_lora_model: bool  # False
    on_bad_rows: Literal["stop", "skip"]  # 'stop'
    accept_any_text: bool  # False
    max_example_num_per_dataset: int  # 100000000
    same_dataset_within_batch: bool  # False
    small_threshold: int  # 0
    drop_threshold: int  # 0
    dataset_weights: str | Path | Sequence[str | Path] | None
    train_group_size: int  # 8
    query_max_len: int  # 32
    passage_max_len: int  # 128
    pad_to_multiple_of: int | None
    shuffle_ratio: float  # 0.0
    batch_by: Literal["random", "similarity"]  # 'random'
    batch_clusters: int | None
    batch_vectors: str | Path | None
    average_checkpoints: int | None
    global_batch_size: int | None
    temperature: float  # 0.02
    negatives_cross_device: bool  # True
    use_inbatch_neg: bool  # True
    sub_batch_size: int | None
    sub_batch_tokens: int | None
    knowledge_distillation: bool  # False
    kd_loss_type: Literal["kl_div", "m3_kd_loss", "margin_mse", "score_mse", "cosent", "soft_labels"]  # 'kl_div'
    teacher_temperature: float  # 1.0
    contrastive_weight: float  # 1.0
    score_bands: str | Path | Sequence[str | Path] | None
    use_mrl: bool  # False
    mrl_dims: int | Sequence[int] | None
    score_block: int | None
    directions: Literal["query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc", None]
    partition_mode: Literal["joint", "per_direction"]  # 'joint'
    bidirectional: bool  # False
    hardness_mode: Literal["in_batch_negatives", "hard_negatives", "all_negatives", None]
    hardness_strength: float | None
    hardness_normalize: bool  # False
    mask_known_positives: bool  # True
    false_negative_margin: float | None
    guide_model: str | Path | None
    eval_data: str | Path | Sequence[str | Path] | None
    eval_corpus: str | Path | Sequence[str | Path] | None
    keep_better: bool  # False
    config: str | Path | None
    dry_run: bool  # False
    verbose: bool  # False
    overwrite_output_dir: bool  # False
    resume: bool  # False
    log_rows: bool  # False
    max_bad_steps: int  # 3
    ema: float | None
    warmup_ratio: float  # 0.0
    logging_dir: str | Path | None
    license: str | Path | None
    language: str | Path | Sequence[str | Path] | None
    num_workers: str | Path | int | None
    use_gpu: bool | None
    cpus_per_worker: int | None
    storage_path: str | Path | None
    max_failures: int  # 0
    address: str | Path | None
    cache_path: str | Path | None
    stall_timeout: float  # 600.0


class TuneKeywords(TrainKeywords, total=False):
    """Keyword arguments of raybge.tune_finetune."""

    search: str | Path | Sequence[str | Path] | None
    num_samples: int  # 8
    metric: Literal["nDCG@10", "MRR@10"]  # 'nDCG@10'
    mode: Literal["max", "min"]  # 'max'
    scheduler: Literal["asha", "median", "pbt", "none"]  # 'asha'
    search_alg: Literal["optuna", "hyperopt", "bohb", "random", None]
    max_concurrent: int | None
    time_budget: float | None
    mine_config: str | Path | None
    held_out: float  # 0.05


class PretrainKeywords(TrainingArgumentKeywords, total=False):
    """Keyword arguments of raybge.pretrain_retromae."""

    train_data: Required[str | Path | Sequence[str | Path]]
    cache_dir: str | Path | None
    trust_remote_code: bool  # False
    allow_unknown_tokens: bool  # False
    model_name_or_path: str | Path | None
    config_name: str | Path | None
    tokenizer_name: str | Path | None
    token: str | Path | None
    use_fast_tokenizer: bool  # True
    on_bad_rows: Literal["stop", "skip"]  # 'stop'
    accept_any_text: bool  # False
    max_example_num_per_dataset: int  # 100000000
    same_dataset_within_batch: bool  # False
    small_threshold: int  # 0
    drop_threshold: int  # 0
    dataset_weights: str | Path | Sequence[str | Path] | None
    max_seq_length: int  # 512
    average_checkpoints: int | None
    global_batch_size: int | None
    encoder_mlm_probability: float  # 0.3
    decoder_mlm_probability: float  # 0.5
    pretrain_method: Literal["retromae", "dupmae"]  # 'retromae'
    bow_loss_weight: float  # 0.1
    config: str | Path | None
    dry_run: bool  # False
    verbose: bool  # False
    overwrite_output_dir: bool  # False
    resume: bool  # False
    log_rows: bool  # False
    max_bad_steps: int  # 3
    ema: float | None
    warmup_ratio: float  # 0.0
    logging_dir: str | Path | None
    license: str | Path | None
    language: str | Path | Sequence[str | Path] | None
    num_workers: str | Path | int | None
    use_gpu: bool | None
    cpus_per_worker: int | None
    storage_path: str | Path | None
    max_failures: int  # 0
    address: str | Path | None
    cache_path: str | Path | None
    stall_timeout: float  # 600.0
