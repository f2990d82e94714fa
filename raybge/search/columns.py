"""Arrow columns of encoded blocks: vectors as fixed-size lists, known keys as lists of 64-bit words.

Letters in array names: N rows, D width of a vector, Q queries, K known keys of all rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa


def vectors_column(vectors_ND: np.ndarray) -> pa.Array:
    """Return vectors (N, D) as a column of fixed-size lists of D numbers."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors_ND).ravel()), vectors_ND.shape[1])


def vectors_of(table: pa.Table) -> np.ndarray:
    """Return the column `vector` of an encoded block as (N, D) float32, without a copy where Arrow allows it."""
    column = _one_chunk(table["vector"])
    vectors_ND: np.ndarray = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    return vectors_ND


def keys_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the known keys of an encoded block.

    Args:
        table: a block with the column `known`.

    Returns:
        (keys_K2, counts_Q): the keys of all rows, one after the other, and the number of keys of each row.
    """
    column = _one_chunk(table["known"])
    lengths = column.value_lengths().to_numpy()
    return column.flatten().to_numpy().reshape(-1, 2), lengths // 2


def _one_chunk(column: pa.ChunkedArray) -> Any:
    """Return the column as one array; a column of one chunk is not copied."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
