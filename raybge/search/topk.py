"""Ordering of candidates: by score, then by passage id, so that every machine orders ties the same way.

Letters in array names: Q queries, K candidates of a query, M candidates of all lists together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NO_ID = -1  # passage id of an empty place
_LAST = np.iinfo(np.int64).max


def no_candidates(queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an empty candidate list, (scores_Q0, ids_Q0), for each of `queries` queries."""
    return np.zeros((queries, 0), np.float32), np.zeros((queries, 0), np.int64)


def merge(lists: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best of several candidate lists of the same queries.

    Args:
        lists: pairs (scores_QK, ids_QK), in any order; K may differ. An id of -1 is an empty place.
        k: number of candidates to keep.

    Returns:
        (scores_Qk, ids_Qk) by score descending, then id ascending; missing candidates have score -inf and id -1.
    """
    scores_QM = np.concatenate([scores_QK for scores_QK, _ in lists], axis=1)
    ids_QM = np.concatenate([ids_QK for _, ids_QK in lists], axis=1)
    return top(scores_QM, ids_QM, k)


def top(scores_QM: np.ndarray, ids_QM: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best of one list.

    Args:
        scores_QM: scores, in any order.
        ids_QM: passage ids; -1 is an empty place.
        k: number of candidates to keep.

    Returns:
        (scores_Qk, ids_Qk), as `merge` returns them.
    """
    missing = max(0, k - scores_QM.shape[1])
    scores_QM = np.where(ids_QM < 0, -np.inf, scores_QM).astype(np.float32, copy=False)
    if missing:
        scores_QM = np.pad(scores_QM, ((0, 0), (0, missing)), constant_values=-np.inf)
        ids_QM = np.pad(ids_QM, ((0, 0), (0, missing)), constant_values=NO_ID)
    order_QM = np.lexsort((np.where(ids_QM < 0, _LAST, ids_QM), -scores_QM), axis=1)[:, :k]
    return np.take_along_axis(scores_QM, order_QM, axis=1), np.take_along_axis(ids_QM, order_QM, axis=1)
