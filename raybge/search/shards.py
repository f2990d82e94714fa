"""Inner-product search over a part of the pool. Nothing here knows Ray: actors hold a `Host`.

Passages are known by their id, the order of their first appearance in the pool; shard s holds the ids
[s * shard_size, (s + 1) * shard_size).

Letters in array names: Q queries, K candidates, P passages, D width of a vector, N keys or ids, M places found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.search import topk
from raybge.search.store import Store
from raybge.util.errors import UserError

TIE_MARGIN = 16  # candidates fetched beyond k, to see whether the k-th one ties with what comes after it
GPU_MOST = 2048  # faiss lists no more candidates than this on a GPU
FLAT = "Flat"
TRAINED_ON = 256 * 1024  # vectors of a shard that an index is trained on, at most
KNOWN_AT_ONCE = 16_384  # passages whose vectors are fetched together
KEY_BYTES = 24  # of memory for each passage, beside its vector


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a block of the store: consecutive passages of one shard."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Kind:
    """How a shard is searched: any faiss factory string, "Flat" being exact."""

    factory: str = FLAT
    gpu: bool = False

    @property
    def exact(self) -> bool:
        return self.factory == FLAT


class Shard:
    """Consecutive passages, `first` being the id of the first of them: their blocks on disk, and once `load`ed their
    vectors in an index.

    A block is mapped into memory only while it is looked at: what is mapped counts as a process's memory.
    """

    def __init__(self, first: int, store: Store, parts: Sequence[Part]) -> None:
        self.first = first
        self._store, self._parts = store, parts
        self._ends = np.cumsum([part.stop - part.start for part in parts])
        self._index: Any = None
        self._most = len(self)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def dim(self) -> int:
        return int(self._table(self._parts[0])["vector"].type.list_size)

    def keys(self) -> np.ndarray:
        """Each passage's key, (P, 2) uint64."""
        return np.concatenate([keys_of(self._table(part))[0] for part in self._parts])

    def _table(self, part: Part) -> pa.Table:
        return self._store.table(part.name).slice(part.start, part.stop - part.start)

    def load(self, kind: Kind) -> None:
        """Build the index. One thread builds it, so that it is the same on every machine."""
        self._exact = kind.exact
        self._most = GPU_MOST if kind.gpu else len(self)
        self._index = empty_index(self.dim, kind)
        if not self._index.is_trained:
            rows = np.random.default_rng(self.first).permutation(len(self))[:TRAINED_ON]
            try:
                self._index.train(self.vectors(self.first + np.sort(rows)))
            except RuntimeError:  # too few for it, as the last shard can be: these are searched exactly
                self._index = empty_index(self.dim, Kind(gpu=kind.gpu))
        for part in self._parts:  # block by block: nothing but the index holds all vectors
            self._index.add(vectors_of(self._table(part)))

    def unload(self) -> None:
        """Free the index."""
        self._index = None

    def search(self, q_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores_QK, ids_QK) of the K = min(k, passages) best, by score descending, then id ascending.

        faiss lists ties in an order of its own and cuts them anywhere. So more than k are fetched, and more
        again while the k-th score is still that of the last one: texts that are equal once truncated tie.
        """
        most = min(len(self), self._most)
        k, fetch = min(k, most), min(k + TIE_MARGIN, most)
        while True:
            scores_QF, local_QF = self._index.search(q_QD, fetch)
            tied = (scores_QF[:, k - 1] == scores_QF[:, -1]).any()
            if not self._exact or fetch == most or not tied:
                break
            fetch = min(4 * fetch, most)
        return topk.top(scores_QF, np.where(local_QF < 0, topk.NOTHING, local_QF + self.first), k)

    def search_exactly(self, q_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, over the vectors themselves, block by block."""
        best, first = topk.nothing(len(q_QD)), self.first
        for part in self._parts:
            scores_QP = q_QD @ vectors_of(self._table(part)).T
            ids_QP = np.broadcast_to(np.arange(first, first + scores_QP.shape[1]), scores_QP.shape)
            best = topk.merge([best, (scores_QP, ids_QP)], k)
            first += scores_QP.shape[1]
        return best

    def texts(self, ids: np.ndarray, column: str = "text") -> list[str]:
        """The texts of passages of this shard, or another column of theirs."""
        found: dict[int, str] = {}
        for table, mine, rows in self._rows(ids):
            found.update(zip(mine.tolist(), table[column].take(pa.array(rows)).to_pylist(), strict=True))
        return [found[i] for i in ids.tolist()]

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """The vectors of passages of this shard, (N, D)."""
        found_ND = np.empty((len(ids), self.dim), np.float32)
        for table, mine, rows in self._rows(ids):
            where = np.isin(ids, mine)
            found_ND[where] = vectors_of(table)[rows[np.searchsorted(mine, ids[where])]]
        return found_ND

    def _rows(self, ids: np.ndarray) -> Iterator[tuple[pa.Table, np.ndarray, np.ndarray]]:
        """For each block that has any: the block, which ids it has (sorted, each once), and their rows."""
        ids = np.unique(ids)
        block_N = np.searchsorted(self._ends, ids - self.first, side="right")
        for block in np.unique(block_N).tolist():
            mine = ids[block_N == block]
            table = self._table(self._parts[block])
            yield table, mine, mine - self.first - (self._ends[block] - len(table))


@cache
def _gpu_resources() -> Any:
    """One a process: each reserves memory of its own."""
    import faiss

    return faiss.StandardGpuResources()


def empty_index(dim: int, kind: Kind) -> Any:
    """A faiss index of this kind for vectors of `dim` numbers, on the GPU where asked for."""
    import faiss

    index: Any = (
        faiss.IndexFlatIP(dim) if kind.exact else faiss.index_factory(dim, kind.factory, faiss.METRIC_INNER_PRODUCT)
    )
    if kind.gpu:
        options = faiss.GpuClonerOptions()
        options.useFloat16 = True
        try:
            index = faiss.index_cpu_to_gpu(_gpu_resources(), 0, index, options)
        except RuntimeError as error:
            raise UserError(
                f"--index_factory {kind.factory}: faiss does not search it on a GPU ({_reason(error)})"
            ) from None
    return index


class KeyTable:
    """Finds keys by bisection; 24 bytes a key. Several passages may have the same.

    A key is a 16-byte content hash as two uint64 words.
    """

    def __init__(self, keys_P2: np.ndarray) -> None:
        self._by_key_P = np.lexsort((keys_P2[:, 1], keys_P2[:, 0]))
        self._keys_P2 = keys_P2[self._by_key_P]

    def find(self, keys_N2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place_M, row_M): each row of `keys_P2` whose key is one of those asked for, and which one that is; by place,
        then by row.
        """
        first_N = np.searchsorted(self._keys_P2[:, 0], keys_N2[:, 0])
        count_N = np.searchsorted(self._keys_P2[:, 0], keys_N2[:, 0], side="right") - first_N
        place_M = np.repeat(np.arange(len(keys_N2)), count_N)
        at_M = first_N[place_M] + np.arange(len(place_M)) - (np.cumsum(count_N) - count_N)[place_M]
        same_M = self._keys_P2[at_M, 1] == keys_N2[place_M, 1]  # two keys may share their first 8 bytes
        return place_M[same_M], self._by_key_P[at_M[same_M]]

    def find_one(self, keys_N2: np.ndarray) -> np.ndarray:
        """The row of each key, -1 where it is not among them; of distinct keys."""
        row_N = np.full(len(keys_N2), topk.NOTHING, np.int64)
        place_M, row_M = self.find(keys_N2)
        row_N[place_M] = row_M
        return row_N


@dataclass(frozen=True)
class Known:
    """Passages that have one of the keys of a block of queries: which key that is (numbered through the block), the
    passage's id, and its inner product with the query.
    """

    key_M: np.ndarray
    id_M: np.ndarray
    score_M: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[Known]) -> Known:
        """All parts together, by key, then id."""
        key_M, id_M, score_M = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("key_M", "id_M", "score_M")
        )
        order_M = np.lexsort((id_M, key_M))
        return cls(key_M[order_M], id_M[order_M], score_M[order_M])


class Host:
    """The shards of one actor. Their texts and vectors stay on disk; those of one pass at a time are also in an index.

    Each batch of queries is searched by one thread alone, so that scores do not depend on how many there are.

    Args:
        shards: parts of each shard, by number.
        held: shards in memory at a time; a pass is so many of them.
        threads: that search and build.
    """

    def __init__(
        self, store: Store, shards: Mapping[int, Sequence[Part]], shard_size: int, held: int, kind: Kind, threads: int
    ) -> None:
        import faiss

        # faiss 1.15 leaves batches below about 128,000 / D queries to a kernel of its own: with 64 queries and
        # D = 384 BLAS takes an eighth of its time
        faiss.cvar.distance_compute_blas_threshold = 1
        self._store, self._shard_size, self._held, self._kind = store, shard_size, held, kind
        self._shards = {number: Shard(number * shard_size, store, parts) for number, parts in shards.items()}
        self._tables = {number: KeyTable(shard.keys()) for number, shard in self._shards.items()}
        self._pass = -1
        # faiss's GPU resources serve one thread at a time
        self._pool = ThreadPoolExecutor(1 if kind.gpu else threads, initializer=_one_thread)

    def search(self, turn: int, name: str, k: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores_QK, ids_QK) of a block of queries in this host's shards of pass `turn`, as `topk.merge` orders
        them; `batch` queries are searched at a time.
        """
        numbers = self._load(turn)
        q_QD = vectors_of(self._store.table(name))
        batches = [q_QD[at : at + batch] for at in range(0, len(q_QD), batch)]
        best = topk.nothing(len(q_QD))  # a host may have no shard in a pass
        for number in numbers:
            parts = list(self._pool.map(lambda q, s=self._shards[number]: s.search(q, k), batches))
            found = np.concatenate([s for s, _ in parts]), np.concatenate([i for _, i in parts])
            best = topk.merge([best, found], k)
        return best

    def search_exactly(self, q_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, in all of this host's shards, without an index."""
        lists = self._pool.map(lambda shard: shard.search_exactly(q_QD, k), self._shards.values())
        return topk.merge([topk.nothing(len(q_QD)), *lists], k)

    def known(self, name: str) -> Known:
        """The passages here that have a key of a block of queries."""
        block = self._store.table(name)
        keys_N2, counts_Q = keys_of(block)
        of_N = np.repeat(np.arange(len(counts_Q)), counts_Q)
        q_QD = vectors_of(block)
        found = [Known(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
        for number, shard in self._shards.items():
            key_M, row_M = self._tables[number].find(keys_N2)
            id_M = row_M + shard.first
            pieces = (slice(at, at + KNOWN_AT_ONCE) for at in range(0, len(id_M), KNOWN_AT_ONCE))
            scores = [np.einsum("md,md->m", q_QD[of_N[key_M[p]]], shard.vectors(id_M[p])) for p in pieces]
            found.append(Known(key_M, id_M, np.concatenate([np.zeros(0, np.float32), *scores])))
        return Known.of(found)

    def texts(self, ids: np.ndarray, column: str = "text") -> list[str]:
        """The texts of passages that this host holds, or another column of theirs, in the order of `ids`."""
        found: dict[int, str] = {}
        for number in np.unique(ids // self._shard_size).tolist():
            mine = ids[ids // self._shard_size == number]
            found.update(zip(mine.tolist(), self._shards[number].texts(mine, column), strict=True))
        return [found[i] for i in ids.tolist()]

    def scores(self, q_ND: np.ndarray, ids_N: np.ndarray) -> np.ndarray:
        """The inner product of each vector with a passage that this host holds, (N,)."""
        score_N = np.empty(len(ids_N), np.float32)
        for number in np.unique(ids_N // self._shard_size).tolist():
            here = ids_N // self._shard_size == number
            score_N[here] = np.einsum("nd,nd->n", q_ND[here], self._shards[number].vectors(ids_N[here]))
        return score_N

    def _load(self, turn: int) -> list[int]:
        """Numbers of the shards of a pass, which are then in memory and no others."""
        numbers = sorted(self._shards)[turn * self._held : (turn + 1) * self._held]
        if turn != self._pass:
            for shard in self._shards.values():
                shard.unload()
            list(self._pool.map(lambda number: self._shards[number].load(self._kind), numbers))
            self._pass = turn
        return numbers


def vectors_of(table: pa.Table) -> np.ndarray:
    """The vectors of an encoded block as (rows, D) float32."""
    column = _whole(table["vector"])
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)


def keys_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(keys_N2, counts_Q): the known keys of all rows one after the other, and how many each row has."""
    column = _whole(table["known"])
    lengths = column.value_lengths().to_numpy()
    return column.flatten().to_numpy().reshape(-1, 2), lengths // 2


def _whole(column: pa.ChunkedArray) -> Any:
    """The column as one array: without copying what is one already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def words_of(keys: Sequence[bytes]) -> np.ndarray:
    """16-byte keys as (N, 2) uint64."""
    return np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).astype(np.uint64)


def check_gpu_search(gpus: int = 1) -> None:
    """UserError where `--use_gpu_for_searching` cannot be honoured; before they are counted, as if there were GPUs."""
    import faiss

    if not hasattr(faiss, "GpuIndexFlatIP"):
        raise UserError(
            "--use_gpu_for_searching: the installed faiss is faiss-cpu; install raybge's extra `gpu` instead "
            "of `cpu`, or leave the flag out"
        )
    if not gpus:
        raise UserError("--use_gpu_for_searching: no GPU is there; leave the flag out to search on the CPU")


def check_factory(factory: str, dim: int | None) -> None:
    """UserError for a string that faiss makes no index of, as far as that shows without data."""
    try:
        empty_index(dim or 64, Kind(factory))
    except RuntimeError as error:
        if dim or "parse" in str(error):
            raise UserError(f"--index_factory {factory}: faiss makes no index of it ({_reason(error)})") from None


def _reason(error: RuntimeError) -> str:
    """What faiss says, without the place in its source and the C++ of what failed."""
    return re.sub(r"^Error in .* at \S+:\d+: (Error: '.*' failed: )?", "", str(error).strip())


def _one_thread() -> None:
    import faiss

    faiss.omp_set_num_threads(1)
