"""Similarity of vectors."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import Tensor

from raybge.util.errors import UserError

Vectors = TypeVar("Vectors", np.ndarray, Tensor)


def inner_products(a: Vectors, b: Vectors) -> Vectors:
    """Compute the inner products of vectors; those of quantized vectors would differ.

    Args:
        a: (N, D), or (D,) for one vector, of floats.
        b: (M, D), or (D,) for one vector.

    Returns:
        (N, M).

    Raises:
        UserError: the vectors are no floats.
    """
    for vectors in (a, b):
        if not (vectors.is_floating_point() if isinstance(vectors, Tensor) else vectors.dtype.kind == "f"):
            raise UserError(
                f"similarity: expected vectors of floats, found {vectors.dtype}; compare them before quantizing"
            )
    a_ND, b_MD = (vectors[None] if vectors.ndim == 1 else vectors for vectors in (a, b))
    return a_ND @ b_MD.T
