"""Types and defaults of keyword arguments: `make signatures` writes this file from the options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict


class MixWithDataKeywords(TypedDict, total=False):
    """Keyword arguments of raybge.mix_models_with_data."""

    cache_dir: str | Path | None
    trust_remote_code: bool  # False
    base_model: str | Path | None
    on_bad_rows: Literal["stop", "skip"]  # 'stop'
    accept_any_text: bool  # False
    merge_method: Literal["linear", "slerp", "ties"]  # 'linear'
    ties_density: float  # 0.2
    seed: int  # 42
    search: str | Path | Sequence[str | Path] | None
    search_corpus: str | Path | Sequence[str | Path] | None
    general: str | Path | Sequence[str | Path] | None
    general_corpus: str | Path | Sequence[str | Path] | None
    general_floor: float  # 0.98
    max_evaluations: int  # 30
    config: str | Path | None
    dry_run: bool  # False
    verbose: bool  # False
    overwrite: bool  # False
    num_workers: str | Path | int | None
    use_gpu: bool | None
    cpus_per_worker: int | None
    storage_path: str | Path | None
    address: str | Path | None


class MixKeywords(MixWithDataKeywords, total=False):
    """Keyword arguments of raybge.mix_models."""

    example_data: str | Path | Sequence[str | Path] | None
    temperature: float  # 5.0
    batch_size: int  # 2
    max_input_length: int  # 2048
    neg_number: int  # 7
