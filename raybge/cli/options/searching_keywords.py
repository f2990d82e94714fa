"""Types and defaults of keyword arguments: `make signatures` writes this file from the options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Required, TypedDict


class MineKeywords(TypedDict, total=False):
    """Keyword arguments of raybge.mine_hard_negatives."""

    input_file: Required[str | Path | Sequence[str | Path]]
    output_file: Required[str | Path]
    cache_dir: str | Path | None
    trust_remote_code: bool  # False
    allow_unknown_tokens: bool  # False
    use_fp16: bool  # True
    use_bf16: bool  # False
    encode_backend: Literal["torch", "onnx", "openvino"]  # 'torch'
    encode_precision: Literal["fp32", "bf16", "int8", None]
    pooling_method: Literal["cls", "mean", "last_token", None]
    normalize_embeddings: bool | None
    query_instruction_for_retrieval: str | Path | None
    query_instruction_format: str | Path  # '{}{}'
    passage_instruction_for_retrieval: str | Path | None
    passage_instruction_format: str | Path  # '{}{}'
    model_name_or_path: str | Path | None
    batch_size: int  # 256
    query_max_len: int | None
    passage_max_len: int | None
    on_bad_rows: Literal["stop", "skip"]  # 'stop'
    accept_any_text: bool  # False
    corpus_data: str | Path | Sequence[str | Path] | None
    preset: Literal["strong", None]
    range_for_sampling: str | Path  # '10-210'
    negative_number: int  # 15
    sampling_strategy: Literal["random", "top"]  # 'random'
    absolute_margin: float | None
    relative_margin: float | None
    max_score: float | None
    min_score: float | None
    keep_scores: bool  # False
    seed: int  # 42
    rescore: bool  # False
    cross_encoder: str | Path | None
    score_only: bool  # False
    reranker_batch_size: int  # 256
    reranker_max_length: int | None
    reranker_query_max_length: int | None
    normalize_scores: bool  # False
    relabel: Literal["drop", "promote", "soft", None]
    relabel_margin: float | None
    judge_url: str | Path | None
    judge_model: str | Path | None
    judge_concurrency: int  # 8
    judge_timeout: float  # 120.0
    judge_parameters: dict[str, Any] | str | Path | None
    use_gpu_for_searching: bool | None
    search_batch_size: int | None
    shard_size: int  # 250000
    shards_per_actor: int | None
    index_factory: str | Path  # 'Flat'
    config: str | Path | None
    dry_run: bool  # False
    verbose: bool  # False
    overwrite: bool  # False
    num_workers: str | Path | int | None
    use_gpu: bool | None
    cpus_per_worker: int | None
    storage_path: str | Path | None
    address: str | Path | None


class EvaluateKeywords(TypedDict, total=False):
    """Keyword arguments of raybge.evaluate_retrieval."""

    model_name_or_path: Required[str | Path]
    cache_dir: str | Path | None
    trust_remote_code: bool  # False
    allow_unknown_tokens: bool  # False
    use_fp16: bool  # False
    use_bf16: bool  # False
    encode_backend: Literal["torch", "onnx", "openvino"]  # 'torch'
    encode_precision: Literal["fp32", "bf16", "int8", None]
    pooling_method: Literal["cls", "mean", "last_token", None]
    normalize_embeddings: bool | None
    query_instruction_for_retrieval: str | Path | None
    query_instruction_format: str | Path  # '{}{}'
    passage_instruction_for_retrieval: str | Path | None
    passage_instruction_format: str | Path  # '{}{}'
    add_instruction: bool  # False
    query_max_len: int | None
    passage_max_len: int | None
    batch_size: int  # 256
    on_bad_rows: Literal["stop", "skip"]  # 'stop'
    accept_any_text: bool  # False
    corpus_data: str | Path | Sequence[str | Path] | None
    query_data: str | Path | Sequence[str | Path] | None
    mteb_tasks: str | Path | Sequence[str | Path] | None
    qrels: str | Path | None
    k: int  # 100
    drop_self_hits: bool | None
    save_embedding: bool  # False
    load_embedding: bool  # False
    save_path: str | Path  # 'embeddings.memmap'
    metrics_file: str | Path | None
    run_file: str | Path | None
    compare: str | Path | Sequence[str | Path] | None
    use_gpu_for_searching: bool | None
    search_batch_size: int | None
    shard_size: int  # 250000
    shards_per_actor: int | None
    index_factory: str | Path  # 'Flat'
    config: str | Path | None
    dry_run: bool  # False
    verbose: bool  # False
    num_workers: str | Path | int | None
    use_gpu: bool | None
    cpus_per_worker: int | None
    storage_path: str | Path | None
    address: str | Path | None


class EncodeDatasetKeywords(TypedDict, total=False):
    """Keyword arguments of raybge.encode_dataset with a Ray Dataset."""

    model_name_or_path: Required[str | Path]
    cache_dir: str | Path | None
    trust_remote_code: bool  # False
    allow_unknown_tokens: bool  # False
    use_fp16: bool  # True
    use_bf16: bool  # False
    encode_backend: Literal["torch", "onnx", "openvino"]  # 'torch'
    encode_precision: Literal["fp32", "bf16", "int8", None]
    pooling_method: Literal["cls", "mean", "last_token", None]
    normalize_embeddings: bool | None
    query_instruction_for_retrieval: str | Path | None
    query_instruction_format: str | Path  # '{}{}'
    passage_instruction_for_retrieval: str | Path | None
    passage_instruction_format: str | Path  # '{}{}'
    kind: Literal["query", "passage"]  # 'passage'
    batch_size: int  # 256
    max_length: int | None
    text_field: str | Path  # 'text'
    truncate_dim: int | None
    precision: Literal["float32", "int8", "uint8", "binary", "ubinary"]  # 'float32'
    ranges: str | Path | None
    config: str | Path | None
    verbose: bool  # False
    num_workers: str | Path | int | None
    use_gpu: bool | None
    cpus_per_worker: int | None
    address: str | Path | None


class EncodeKeywords(EncodeDatasetKeywords, total=False):
    """Keyword arguments of raybge.encode_dataset."""

    input_file: Required[str | Path | Sequence[str | Path]]
    output_file: Required[str | Path]
    on_bad_rows: Literal["stop", "skip"]  # 'stop'
    accept_any_text: bool  # False
    keep_fields: str | Path | Sequence[str | Path] | None
    dry_run: bool  # False
    overwrite: bool  # False
    storage_path: str | Path | None
