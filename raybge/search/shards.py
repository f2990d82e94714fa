"""Inner-product search over a part of the pool, without Ray: actors hold a `ShardSearcher`.

A passage's id is the position of its first appearance in the pool; shard s holds the ids
[s * shard_size, (s + 1) * shard_size).

Letters in array names: Q queries, K candidates, P passages, D width of a vector, N keys or ids, M matches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.search import topk
from raybge.search.columns import keys_of, vectors_of
from raybge.search.faiss_index import GPU_MAX_CANDIDATES, IndexKind, empty_index
from raybge.search.key_table import KeyTable
from raybge.search.store import Store

TIE_MARGIN = 16  # candidates fetched beyond k, to detect that the k-th one ties with those after it
TRAINING_VECTORS = 256 * 1024  # vectors of a shard on which an index is trained, at most
LOOKUP_CHUNK = 16_384  # passages whose vectors are fetched together


@dataclass(frozen=True)
class BlockSlice:
    """Rows [start, stop) of a block of the store: consecutive passages of one shard."""

    name: str
    start: int
    stop: int


class Shard:
    """Consecutive passages: their blocks on disk and, after `load`, an index of their vectors.

    A block is memory-mapped only while it is read, since mapped pages count as memory of the process.
    """

    def __init__(self, first: int, store: Store, slices: Sequence[BlockSlice]) -> None:
        """Describe the shard; nothing is read yet.

        Args:
            first: id of the first passage.
            store: store of the encoded blocks.
            slices: the passages, in order.
        """
        self.first = first
        self._store, self._slices = store, slices
        self._ends = np.cumsum([part.stop - part.start for part in slices])
        self._index: Any = None
        self._max_candidates = len(self)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        return int(self._table(self._slices[0])["vector"].type.list_size)

    def keys(self) -> np.ndarray:
        """Return the key of each passage, (P, 2) uint64."""
        return np.concatenate([keys_of(self._table(part))[0] for part in self._slices])

    def _table(self, part: BlockSlice) -> pa.Table:
        return self._store.table(part.name).slice(part.start, part.stop - part.start)

    def load(self, kind: IndexKind) -> None:
        """Build the index. One thread builds it, so that it is the same on every machine."""
        self._exact = kind.exact
        self._max_candidates = GPU_MAX_CANDIDATES if kind.gpu else len(self)
        self._index = empty_index(self.dim, kind)
        if not self._index.is_trained:
            rows = np.random.default_rng(self.first).permutation(len(self))[:TRAINING_VECTORS]
            try:
                self._index.train(self.vectors(self.first + np.sort(rows)))
            except RuntimeError:  # too few vectors to train on, as in the last shard: it is searched exactly
                self._index = empty_index(self.dim, IndexKind(gpu=kind.gpu))
        for part in self._slices:  # block by block: only the index holds all vectors
            self._index.add(vectors_of(self._table(part)))

    def unload(self) -> None:
        """Free the index."""
        self._index = None

    def search(self, q_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search the loaded index.

        faiss orders ties arbitrarily and cuts them anywhere. Therefore more than k candidates are fetched, and more
        again while the k-th score equals the last one: texts that are equal once truncated tie.

        Args:
            q_QD: query vectors.
            k: number of candidates.

        Returns:
            (scores_QK, ids_QK) of the K = min(k, P) best, by score descending, then id ascending.
        """
        limit = min(len(self), self._max_candidates)
        k, fetch = min(k, limit), min(k + TIE_MARGIN, limit)
        while True:
            scores_QF, local_QF = self._index.search(q_QD, fetch)
            tied = (scores_QF[:, k - 1] == scores_QF[:, -1]).any()
            if not self._exact or fetch == limit or not tied:
                break
            fetch = min(4 * fetch, limit)
        return topk.top(scores_QF, np.where(local_QF < 0, topk.NO_ID, local_QF + self.first), k)

    def search_exactly(self, q_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search the vectors themselves, block by block; arguments and result as in `search`."""
        best, first = topk.no_candidates(len(q_QD)), self.first
        for part in self._slices:
            scores_QP = q_QD @ vectors_of(self._table(part)).T
            ids_QP = np.broadcast_to(np.arange(first, first + scores_QP.shape[1]), scores_QP.shape)
            best = topk.merge([best, (scores_QP, ids_QP)], k)
            first += scores_QP.shape[1]
        return best

    def texts(self, ids: np.ndarray, column: str = "text") -> list[str]:
        """Return the texts, or another `column`, of passages of this shard, in the order of `ids`."""
        values: dict[int, str] = {}
        for table, block_ids, rows in self._rows(ids):
            values.update(zip(block_ids.tolist(), table[column].take(pa.array(rows)).to_pylist(), strict=True))
        return [values[i] for i in ids.tolist()]

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors of passages of this shard, (N, D) float32."""
        vectors_ND = np.empty((len(ids), self.dim), np.float32)
        for table, block_ids, rows in self._rows(ids):
            here_N = np.isin(ids, block_ids)
            vectors_ND[here_N] = vectors_of(table)[rows[np.searchsorted(block_ids, ids[here_N])]]
        return vectors_ND

    def _rows(self, ids: np.ndarray) -> Iterator[tuple[pa.Table, np.ndarray, np.ndarray]]:
        """Yield each block that has any of the ids, with its ids (sorted, unique) and their rows."""
        ids = np.unique(ids)
        block_N = np.searchsorted(self._ends, ids - self.first, side="right")
        for block in np.unique(block_N).tolist():
            block_ids = ids[block_N == block]
            table = self._table(self._slices[block])
            yield table, block_ids, block_ids - self.first - (self._ends[block] - len(table))


@dataclass(frozen=True)
class KnownPassages:
    """Passages that have one of the known keys of a block of queries.

    Args:
        key_M: position of the key among all keys of the block.
        id_M: passage id.
        score_M: inner product of the passage with the query of the key.
    """

    key_M: np.ndarray
    id_M: np.ndarray
    score_M: np.ndarray

    @classmethod
    def concatenate(cls, parts: Sequence[KnownPassages]) -> KnownPassages:
        """Return all parts together, by key, then id."""
        key_M, id_M, score_M = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("key_M", "id_M", "score_M")
        )
        order_M = np.lexsort((id_M, key_M))
        return cls(key_M[order_M], id_M[order_M], score_M[order_M])


class ShardSearcher:
    """Shards of one actor. Texts and vectors stay on disk; the shards of one pass at a time also have an index.

    Each batch of queries is searched by one thread, so that scores do not depend on the number of threads.
    """

    def __init__(
        self,
        store: Store,
        shards: Mapping[int, Sequence[BlockSlice]],
        shard_size: int,
        resident: int,
        kind: IndexKind,
        threads: int,
    ) -> None:
        """Read the keys of the passages; indexes are built at the first search of a pass.

        Args:
            store: store of the encoded blocks.
            shards: block slices of each shard, by shard number.
            shard_size: passages per shard.
            resident: shards in memory at a time; a pass covers so many of them.
            kind: index type.
            threads: threads that search and build.
        """
        import faiss

        # faiss 1.15 uses a kernel of its own for batches below about 128,000 / D queries: with 64 queries and
        # D = 384 BLAS takes an eighth of its time
        faiss.cvar.distance_compute_blas_threshold = 1
        self._store, self._shard_size, self._resident, self._kind = store, shard_size, resident, kind
        self._shards = {number: Shard(number * shard_size, store, slices) for number, slices in shards.items()}
        self._tables = {number: KeyTable(shard.keys()) for number, shard in self._shards.items()}
        self._pass = -1
        # faiss's GPU resources serve one thread at a time
        self._pool = ThreadPoolExecutor(1 if kind.gpu else threads, initializer=_use_one_thread)

    def search(self, pass_number: int, name: str, k: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Search a block of queries in this actor's shards of one pass.

        Args:
            pass_number: the pass, from 0.
            name: block of queries in the store.
            k: number of candidates.
            batch_size: queries searched at a time.

        Returns:
            (scores_QK, ids_QK), in the order of `topk.merge`.
        """
        numbers = self._load(pass_number)
        q_QD = vectors_of(self._store.table(name))
        batches = [q_QD[at : at + batch_size] for at in range(0, len(q_QD), batch_size)]
        best = topk.no_candidates(len(q_QD))  # an actor may have no shard in a pass
        for number in numbers:
            parts = list(self._pool.map(lambda q, s=self._shards[number]: s.search(q, k), batches))
            candidates = np.concatenate([s for s, _ in parts]), np.concatenate([i for _, i in parts])
            best = topk.merge([best, candidates], k)
        return best

    def search_exactly(self, q_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search all shards of this actor without an index; the result is as in `search`."""
        lists = self._pool.map(lambda shard: shard.search_exactly(q_QD, k), self._shards.values())
        return topk.merge([topk.no_candidates(len(q_QD)), *lists], k)

    def known(self, name: str) -> KnownPassages:
        """Return this actor's passages that have a known key of a block of queries."""
        block = self._store.table(name)
        keys_N2, counts_Q = keys_of(block)
        query_N = np.repeat(np.arange(len(counts_Q)), counts_Q)
        q_QD = vectors_of(block)
        parts = [KnownPassages(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
        for number, shard in self._shards.items():
            key_M, row_M = self._tables[number].find(keys_N2)
            id_M = row_M + shard.first
            chunks = (slice(at, at + LOOKUP_CHUNK) for at in range(0, len(id_M), LOOKUP_CHUNK))
            scores = [np.einsum("md,md->m", q_QD[query_N[key_M[c]]], shard.vectors(id_M[c])) for c in chunks]
            parts.append(KnownPassages(key_M, id_M, np.concatenate([np.zeros(0, np.float32), *scores])))
        return KnownPassages.concatenate(parts)

    def texts(self, ids: np.ndarray, column: str = "text") -> list[str]:
        """Return the texts, or another `column`, of passages of this actor, in the order of `ids`."""
        values: dict[int, str] = {}
        for number in np.unique(ids // self._shard_size).tolist():
            shard_ids = ids[ids // self._shard_size == number]
            values.update(zip(shard_ids.tolist(), self._shards[number].texts(shard_ids, column), strict=True))
        return [values[i] for i in ids.tolist()]

    def scores(self, q_ND: np.ndarray, ids_N: np.ndarray) -> np.ndarray:
        """Return the inner product of each vector with a passage of this actor, (N,) float32."""
        score_N = np.empty(len(ids_N), np.float32)
        for number in np.unique(ids_N // self._shard_size).tolist():
            here_N = ids_N // self._shard_size == number
            score_N[here_N] = np.einsum("nd,nd->n", q_ND[here_N], self._shards[number].vectors(ids_N[here_N]))
        return score_N

    def _load(self, pass_number: int) -> list[int]:
        """Load the shards of a pass, and no others, and return their numbers."""
        numbers = sorted(self._shards)[pass_number * self._resident : (pass_number + 1) * self._resident]
        if pass_number != self._pass:
            for shard in self._shards.values():
                shard.unload()
            list(self._pool.map(lambda number: self._shards[number].load(self._kind), numbers))
            self._pass = pass_number
        return numbers


def _use_one_thread() -> None:
    import faiss

    faiss.omp_set_num_threads(1)
