"""Output options of an encoder's methods."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from raybge.model.quantization import Precision


class OutputOptions(TypedDict, total=False):
    """Output options of the encode methods; if unset, vectors are those of the model, in fp32.

    Args:
        truncate_dim: like the constructor's, for this call.
        precision: like `quantize_embeddings`.
        ranges: like `quantize_embeddings`.
        calibration_embeddings: like `quantize_embeddings`.
        show_progress_bar: None shows one on a terminal if encoding takes long.
    """

    truncate_dim: int | None
    precision: Precision
    ranges: np.ndarray | None
    calibration_embeddings: np.ndarray | None
    show_progress_bar: bool | None
