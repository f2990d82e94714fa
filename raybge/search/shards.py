"""Exact inner-product search over a part of the pool. Nothing here knows Ray: actors hold a `Host`.

Passages are known by their id, the order of their first appearance in the pool; shard s holds the ids
[s * shard_size, (s + 1) * shard_size).

Letters in array names: Q queries, K candidates, P passages, D width of a vector, N keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.errors import UserError
from raybge.search import topk

_MARGIN = 16  # candidates fetched beyond k, to see whether the k-th one ties with what comes after it
GPU_MOST = 2048  # faiss lists no more candidates than this on a GPU


class Shard:
    """The vectors, keys and texts of consecutive passages, `first` being the id of the first of them.

    A key is the 16-byte content hash of a text as two uint64 words.
    """

    def __init__(self, first: int, dim: int, gpu: bool = False) -> None:
        import faiss

        self.first = first
        self._most = GPU_MOST if gpu else None
        self._index: Any
        if gpu:
            self._resources = faiss.StandardGpuResources()
            self._index = faiss.GpuIndexFlatIP(self._resources, dim)
        else:
            self._index = faiss.IndexFlatIP(dim)
        self._key_parts: list[np.ndarray] = []
        self._text_parts: list[pa.Array] = [pa.array([], pa.large_string())]

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, vectors_PD: np.ndarray, keys_P2: np.ndarray, texts_P: pa.Array) -> None:
        """Append passages; nothing of what is handed in is kept alive."""
        self._index.add(np.ascontiguousarray(vectors_PD, np.float32))
        self._key_parts.append(keys_P2.copy())
        # concatenating copies: a slice would pin the whole block, vectors too, in Ray's object store
        self._text_parts.append(pa.concat_arrays([texts_P, self._text_parts[0]]))

    def seal(self) -> None:
        """To be called once all passages are in: makes keys and texts quick to look up."""
        self._table = KeyTable(np.concatenate([*self._key_parts, np.zeros((0, 2), np.uint64)]))
        self._texts = pa.concat_arrays(self._text_parts)
        self._key_parts, self._text_parts = [], []

    def search(self, q_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores_QK, ids_QK) of the K = min(k, passages) best, by score descending, then id ascending.

        faiss lists ties in an order of its own and cuts them anywhere. So more than k are fetched, and more
        again while the k-th score is still that of the last one: texts that are equal once truncated tie.
        """
        most = min(len(self), self._most or len(self))
        k, fetch = min(k, most), min(k + _MARGIN, most)
        while True:
            scores_QF, local_QF = self._index.search(q_QD, fetch)
            if fetch == most or not (scores_QF[:, k - 1] == scores_QF[:, -1]).any():
                break
            fetch = min(4 * fetch, most)
        return topk.top(scores_QF, np.where(local_QF < 0, topk.NOTHING, local_QF + self.first), k)

    def find(self, keys_N2: np.ndarray) -> np.ndarray:
        """The passage id of each key, -1 where no passage of this shard has it."""
        rows_N = self._table.find(keys_N2)
        return np.where(rows_N < 0, topk.NOTHING, rows_N + self.first)

    def texts(self, ids: np.ndarray) -> list[str]:
        """The texts of passages of this shard."""
        return self._texts.take(pa.array(ids - self.first)).to_pylist()


class KeyTable:
    """Finds distinct keys, (P, 2) uint64, by bisection: 24 bytes each."""

    def __init__(self, keys_P2: np.ndarray) -> None:
        self._by_key_P = np.lexsort((keys_P2[:, 1], keys_P2[:, 0]))
        self._keys_P2 = keys_P2[self._by_key_P]

    def find(self, keys_N2: np.ndarray) -> np.ndarray:
        """The row of each key in `keys_P2`, -1 where it is not among them."""
        rows_N = np.full(len(keys_N2), topk.NOTHING, np.int64)
        place_N = np.searchsorted(self._keys_P2[:, 0], keys_N2[:, 0])
        open_N = np.arange(len(keys_N2))
        while len(open_N):  # more than once only where two keys share their first 8 bytes
            open_N = open_N[place_N[open_N] < len(self._keys_P2)]
            found_N2 = self._keys_P2[place_N[open_N]]
            open_N, found_N2 = (a[found_N2[:, 0] == keys_N2[open_N, 0]] for a in (open_N, found_N2))
            hit = found_N2[:, 1] == keys_N2[open_N, 1]
            rows_N[open_N[hit]] = self._by_key_P[place_N[open_N[hit]]]
            open_N = open_N[~hit]
            place_N[open_N] += 1
        return rows_N


class Host:
    """The shards of one actor, and the threads they are searched with.

    Each batch of queries is searched by one thread alone, so that scores do not depend on how many there are.
    """

    def __init__(self, shard_size: int, threads: int, gpu: bool) -> None:
        import faiss

        # faiss 1.15 leaves batches below about 128,000 / D queries to a kernel of its own: with 64 queries and
        # D = 384 BLAS takes an eighth of its time
        faiss.cvar.distance_compute_blas_threshold = 1
        self._shard_size = shard_size
        self._gpu = gpu
        self._shards: dict[int, Shard] = {}
        # faiss's GPU resources serve one thread at a time
        self._pool = ThreadPoolExecutor(1 if gpu else threads, initializer=_one_thread)

    def add(self, number: int, table: pa.Table, start: int, stop: int) -> None:
        """Put rows [start, stop) of an encoded block of passages (`pipeline.ENCODED`) into shard `number`."""
        table = table.slice(start, stop - start)
        vectors_PD = vectors_of(table)
        if number not in self._shards:
            self._shards[number] = Shard(number * self._shard_size, vectors_PD.shape[1], self._gpu)
        texts = table["text"].combine_chunks()
        self._shards[number].add(vectors_PD, keys_of(table)[0], texts)

    def seal(self) -> int:
        """Make the shards ready; returns how many passages they hold."""
        for shard in self._shards.values():
            shard.seal()
        return sum(len(shard) for shard in self._shards.values())

    def search(self, table: pa.Table, k: int, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What an encoded block of queries finds here.

        Returns:
            scores_QK, ids_QK: the best of this host's shards, as `topk.merge` orders them.
            known_N: the passage id of each known key of each query, one after the other; -1: not here.
        """
        q_QD = vectors_of(table)
        batches = [q_QD[at : at + batch] for at in range(0, len(q_QD), batch)]
        lists = []
        for number in sorted(self._shards):
            parts = list(self._pool.map(lambda q, s=self._shards[number]: s.search(q, k), batches))
            lists.append((np.concatenate([s for s, _ in parts]), np.concatenate([i for _, i in parts])))
        keys_N2, _ = keys_of(table)
        known_N = np.max([shard.find(keys_N2) for shard in self._shards.values()], axis=0)
        return *topk.merge(lists, k), known_N

    def texts(self, ids: np.ndarray) -> list[str]:
        """The texts of passages that this host holds, in the order of `ids`."""
        found: dict[int, str] = {}
        for number in np.unique(ids // self._shard_size).tolist():
            mine = ids[ids // self._shard_size == number]
            found.update(zip(mine.tolist(), self._shards[number].texts(mine), strict=True))
        return [found[i] for i in ids.tolist()]


def vectors_of(table: pa.Table) -> np.ndarray:
    """The vectors of an encoded block as (rows, D) float32."""
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)


def keys_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(keys_N2, counts_Q): the known keys of all rows one after the other, and how many each row has."""
    column = table["known"].combine_chunks()
    lengths = column.value_lengths().to_numpy()
    return column.flatten().to_numpy().reshape(-1, 2), lengths // 2


def words_of(keys: Sequence[bytes]) -> np.ndarray:
    """16-byte keys as (N, 2) uint64."""
    return np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).astype(np.uint64)


def check_gpu_search(gpus: int) -> None:
    """UserError where `--use_gpu_for_searching` cannot be honoured."""
    import faiss

    if not hasattr(faiss, "GpuIndexFlatIP"):
        raise UserError(
            "--use_gpu_for_searching: the installed faiss is faiss-cpu; install raybge's extra `gpu` instead "
            "of `cpu`, or leave the flag out"
        )
    if not gpus:
        raise UserError("--use_gpu_for_searching: no GPU is there; leave the flag out to search on the CPU")


def _one_thread() -> None:
    import faiss

    faiss.omp_set_num_threads(1)
