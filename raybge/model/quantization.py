"""Vectors in fewer bytes: a byte a number (`int8`, `uint8`) or a bit a number (`binary`, `ubinary`). numpy only.

The bytes are those of sentence-transformers' `quantize_embeddings` with the same ranges, so that an index made with the
one is searched with the other.

Letters in array names: N vectors, D numbers of each, P = ceil(D / 8) bytes of a packed one.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from raybge.util.errors import UserError

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
SCALAR = ("int8", "uint8")  # those that need ranges
_STEPS = 255  # between the ends of a range: 256 values


def quantize_embeddings(
    embeddings: Any,
    precision: Precision = "int8",
    ranges: Any = None,
    calibration_embeddings: Any = None,
) -> np.ndarray:
    """Vectors at a lower precision.

    Args:
        embeddings: (N, D) or (D,) of floats: numpy, a torch tensor, or a list of either.
        precision: "int8" and "uint8" cut each dimension's range into 256 steps; "binary" (int8) and "ubinary" (uint8)
            keep whether a number is above 0, eight to a byte, the first in the highest bit; "float32" changes nothing.
        ranges: (2, D): the least and the greatest value of each dimension, for int8 and uint8; what lies outside
            becomes the nearest end. All that is compared must have the same ranges.
        calibration_embeddings: (C, D) floats whose own least and greatest values are the ranges.
            Without both, those of `embeddings` themselves, of which there must then be two or more.

    Returns:
        (N, D) or (D,) int8, uint8 or float32; of "binary" and "ubinary" (N, P) or (P,), the last bits 0.

    Raises:
        UserError: another precision, vectors that are no floats, ranges of another shape or with none to be had.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    e_ND = _floats(embeddings, "embeddings")
    if precision == "float32":
        return e_ND.astype(np.float32, copy=False)
    if precision in SCALAR and e_ND.size == 0:
        return e_ND.astype(precision)  # there is nothing to take ranges from
    if precision in SCALAR:
        if ranges is None:
            ranges = ranges_of(e_ND if calibration_embeddings is None else calibration_embeddings)
        return _scalar(e_ND, np.asarray(ranges), precision)
    packed_NP = np.packbits(e_ND > 0, axis=-1)
    # with the highest bit turned, 0 to 255 reads as -128 to 127
    return packed_NP if precision == "ubinary" else (packed_NP ^ 0x80).view(np.int8)


def ranges_of(embeddings: Any) -> np.ndarray:
    """(2, D) fp32: the least and the greatest value of each dimension of (N, D) vectors. UserError for fewer than 2."""
    e_ND = _floats(embeddings, "embeddings")
    if e_ND.ndim != 2 or len(e_ND) < 2:
        raise UserError(
            f"ranges need two vectors or more, found {len(e_ND) if e_ND.ndim == 2 else 1}: give `ranges`, or "
            "`calibration_embeddings` of the collection that is searched"
        )
    return np.stack([e_ND.min(axis=0), e_ND.max(axis=0)]).astype(np.float32)


def packed_width(dim: int, precision: str) -> int:
    """Numbers in a vector of `dim` at a precision."""
    return -(-dim // 8) if precision.endswith("binary") else dim


def _scalar(e_ND: np.ndarray, ranges_2D: np.ndarray, precision: str) -> np.ndarray:
    if ranges_2D.shape != (2, e_ND.shape[-1]):
        raise UserError(f"ranges: expected the shape (2, {e_ND.shape[-1]}), found {ranges_2D.shape}")
    low_D, high_D = ranges_2D.astype(np.float32, copy=False)
    step_D = (high_D - low_D) / _STEPS
    step_D = np.where(step_D == 0, 1, step_D)  # a dimension that is the same everywhere
    level_ND = np.clip(np.floor((e_ND - low_D) / step_D), 0, _STEPS)
    return level_ND.astype(np.uint8) if precision == "uint8" else (level_ND - 128).astype(np.int8)


def _floats(vectors: Any, name: str) -> np.ndarray:
    if isinstance(vectors, list | tuple):
        vectors = [_host(each) for each in vectors]
    array = np.asarray(_host(vectors))
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{name} must be floats, found {array.dtype}")
    return array


def _host(vectors: Any) -> Any:
    """What numpy reads: a torch tensor's values on the CPU, bfloat16, which numpy lacks, as fp32."""
    if not hasattr(vectors, "detach"):
        return vectors
    tensor = vectors.detach().cpu()
    return (tensor.float() if tensor.element_size() < 4 else tensor).numpy()
