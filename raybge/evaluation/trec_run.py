"""Lines of a TREC run, from which trec_eval computes the metrics that raybge reports.

Letters in array names: Q queries, K ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

TAG = "raybge"  # name of the run in each line
FIELDS = 6  # of a line, separated by white space


def run_lines(queries: Sequence[object], ids_QK: np.ndarray, scores_QK: np.ndarray, names: Mapping[int, str]) -> bytes:
    """Return the lines «query Q0 document rank score tag» of some queries.

    Args:
        queries: names of the queries.
        ids_QK: passage ids by rank; -1 for an empty rank.
        scores_QK: their scores, descending.
        names: names of the passages by id.

    Returns:
        The lines.
    """
    lines = []
    for query, ids, scores in zip(queries, ids_QK.tolist(), decreasing_scores(scores_QK).tolist(), strict=True):
        for rank, (i, score) in enumerate(zip(ids, scores, strict=True), start=1):
            if i >= 0:
                lines.append(f"{query} Q0 {names[i]} {rank} {score!r} {TAG}\n")
    return "".join(lines).encode()


def decreasing_scores(scores_QK: np.ndarray) -> np.ndarray:
    """Return scores that decrease strictly from rank to rank, each the next below the one before where they tie.

    trec_eval ignores the rank, reads the scores as 32-bit numbers and orders ties by the names of the documents.

    Args:
        scores_QK: scores, descending; -inf for empty ranks at the end.

    Returns:
        float32 scores of the same shape.
    """
    # Read as whole numbers, floats above zero are in the same order, and neighbors differ by one.
    bits_QK = scores_QK.astype(np.float32).view(np.int32).astype(np.int64)
    sign_bit = -(1 << 31)
    order_QK = np.where(bits_QK < 0, sign_bit - bits_QK, bits_QK)
    rank_K = np.arange(scores_QK.shape[1])
    order_QK = np.minimum.accumulate(order_QK + rank_K, axis=1) - rank_K
    bits_QK = np.where(order_QK < 0, sign_bit - order_QK, order_QK)
    return bits_QK.astype(np.int32).view(np.float32)
