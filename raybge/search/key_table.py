"""Lookup of passages by the 16-byte hash of their content.

Letters in array names: P passages, N keys to look up, M matches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raybge.search.topk import NO_ID

KEY_BYTES = 24  # memory per passage of a KeyTable


class KeyTable:
    """Finds keys by bisection; 24 bytes per key. Several passages may share a key."""

    def __init__(self, keys_P2: np.ndarray) -> None:
        """Sort the keys.

        Args:
            keys_P2: key of each passage, a 16-byte content hash as two uint64 words.
        """
        self._order_P = np.lexsort((keys_P2[:, 1], keys_P2[:, 0]))
        self._keys_P2 = keys_P2[self._order_P]

    def find(self, keys_N2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find all passages of the given keys.

        Args:
            keys_N2: keys to look up.

        Returns:
            (query_M, row_M): index into `keys_N2` and row of the passage for each match; by index, then by row.
        """
        first_N = np.searchsorted(self._keys_P2[:, 0], keys_N2[:, 0])
        count_N = np.searchsorted(self._keys_P2[:, 0], keys_N2[:, 0], side="right") - first_N
        query_M = np.repeat(np.arange(len(keys_N2)), count_N)
        at_M = first_N[query_M] + np.arange(len(query_M)) - (np.cumsum(count_N) - count_N)[query_M]
        same_M = self._keys_P2[at_M, 1] == keys_N2[query_M, 1]  # two keys may share their first 8 bytes
        return query_M[same_M], self._order_P[at_M[same_M]]

    def find_one(self, keys_N2: np.ndarray) -> np.ndarray:
        """Return the row of each key, (N,) int64, -1 for an unknown key; for tables of distinct keys."""
        row_N = np.full(len(keys_N2), NO_ID, np.int64)
        query_M, row_M = self.find(keys_N2)
        row_N[query_M] = row_M
        return row_N


def key_words(keys: Sequence[bytes]) -> np.ndarray:
    """Return N keys of 16 bytes as (N, 2) uint64."""
    return np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).astype(np.uint64)
