"""Quantized vectors: one byte per number (`int8`, `uint8`) or one bit per number (`binary`, `ubinary`). numpy only.

The bytes equal those of sentence-transformers' `quantize_embeddings` with the same ranges, so an index built with
either can be searched with the other.

Letters in array names: N vectors, D numbers of each, P = ceil(D / 8) bytes of a packed one.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, get_args

import numpy as np

from raybge.util.errors import UserError

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
SCALAR = ("int8", "uint8")  # precisions that require ranges
_STEPS = 255  # between the ends of a range, which give 256 values


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


def quantize_embeddings(
    embeddings: Any,
    precision: Precision = "int8",
    ranges: Any = None,
    calibration_embeddings: Any = None,
) -> np.ndarray:
    """Convert vectors to a lower precision.

    Args:
        embeddings: (N, D) or (D,) of floats: numpy, a torch tensor, or a list of either.
        precision: "int8" and "uint8" cut each dimension's range into 256 steps; "binary" (int8) and "ubinary" (uint8)
            store one bit per number, 1 above 0, eight to a byte, the first in the highest bit; "float32" changes
            nothing.
        ranges: (2, D): least and greatest value of each dimension, for int8 and uint8; values outside are clipped.
            Vectors that are compared with each other must have the same ranges.
        calibration_embeddings: (C, D) floats whose least and greatest values become the ranges. If unset like
            `ranges`: those of `embeddings` themselves, which must then be two or more.

    Returns:
        (N, D) or (D,) int8, uint8 or float32; for "binary" and "ubinary" (N, P) or (P,), the last bits 0.

    Raises:
        UserError: unknown precision, vectors that are not floats, ranges of another shape, or too few vectors to
            derive ranges from.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    e_ND = _floats(embeddings, "embeddings")
    if precision == "float32":
        return e_ND.astype(np.float32, copy=False)
    if precision in SCALAR and e_ND.size == 0:
        return e_ND.astype(precision)  # no vectors to derive ranges from
    if precision in SCALAR:
        if ranges is None:
            ranges = ranges_of(e_ND if calibration_embeddings is None else calibration_embeddings)
        return _scalar(e_ND, np.asarray(ranges), precision)
    packed_NP = np.packbits(e_ND > 0, axis=-1)
    # flipping the highest bit maps 0..255 to -128..127
    return packed_NP if precision == "ubinary" else (packed_NP ^ 0x80).view(np.int8)


def ranges_of(embeddings: Any) -> np.ndarray:
    """Return the least and the greatest value of each dimension, (2, D) fp32; UserError for fewer than 2 vectors."""
    e_ND = _floats(embeddings, "embeddings")
    if e_ND.ndim != 2 or len(e_ND) < 2:
        raise UserError(
            f"ranges need two vectors or more, found {len(e_ND) if e_ND.ndim == 2 else 1}: pass `ranges`, or "
            "`calibration_embeddings` from the searched collection"
        )
    return np.stack([e_ND.min(axis=0), e_ND.max(axis=0)]).astype(np.float32)


def packed_width(dim: int, precision: str) -> int:
    """Return the numbers (bytes for bit precisions) of a vector of width `dim` at a precision."""
    return -(-dim // 8) if precision.endswith("binary") else dim


def _scalar(e_ND: np.ndarray, ranges_2D: np.ndarray, precision: str) -> np.ndarray:
    """Quantize to 256 steps per dimension."""
    if ranges_2D.shape != (2, e_ND.shape[-1]):
        raise UserError(f"ranges: expected the shape (2, {e_ND.shape[-1]}), found {ranges_2D.shape}")
    low_D, high_D = ranges_2D.astype(np.float32, copy=False)
    step_D = (high_D - low_D) / _STEPS
    step_D = np.where(step_D == 0, 1, step_D)  # a constant dimension
    level_ND = np.clip(np.floor((e_ND - low_D) / step_D), 0, _STEPS)
    return level_ND.astype(np.uint8) if precision == "uint8" else (level_ND - 128).astype(np.int8)


def _floats(vectors: Any, name: str) -> np.ndarray:
    """Return vectors as a numpy array of floats; UserError that names the argument otherwise."""
    if isinstance(vectors, list | tuple):
        vectors = [_host(each) for each in vectors]
    array = np.asarray(_host(vectors))
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{name} must be floats, found {array.dtype}")
    return array


def _host(vectors: Any) -> Any:
    """Return a torch tensor as a numpy array, bfloat16 as fp32 since numpy has no such type; other values unchanged."""
    if not hasattr(vectors, "detach"):
        return vectors
    tensor = vectors.detach().cpu()
    return (tensor.float() if tensor.element_size() < 4 else tensor).numpy()
