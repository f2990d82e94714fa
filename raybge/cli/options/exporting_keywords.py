"""Types and defaults of keyword arguments: `make signatures` writes this file from the options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Required, TypedDict


class ExportKeywords(TypedDict, total=False):
    """Keyword arguments of raybge.export_model."""

    model_name_or_path: Required[str | Path]
    output_dir: Required[str | Path]
    cache_dir: str | Path | None
    trust_remote_code: bool  # False
    encode_backend: Literal["onnx", "openvino"]  # 'openvino'
    encode_precision: Literal["fp32", "int8"]  # 'int8'
    sample_data: str | Path | Sequence[str | Path] | None
    accept_any_text: bool  # False
    overwrite_output_dir: bool  # False
    config: str | Path | None
    verbose: bool  # False
