"""The pool as shards on Ray actors, and searching it block by block.

Shards and batches of queries are cut by the data alone: scores do not depend on the number of actors.

Letters in array names: Q queries, K candidates, N known passages of all queries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.cluster import Plan
from raybge.search import topk
from raybge.search.calls import in_order, unwrapped
from raybge.search.pipeline import Piece
from raybge.search.shards import Host


@dataclass(frozen=True)
class Index:
    """The pool in shards, held by Ray actors: shard s by hosts[s % len(hosts)]. `with index:` ends them."""

    hosts: Sequence[Any]
    shard_size: int
    passages: int

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        for host in self.hosts:
            ray.kill(host)

    def texts(self, ids: np.ndarray) -> dict[int, str]:
        """The texts of passages by id; may be called from a Ray task."""
        import ray

        ids = np.unique(ids)
        host_of = ids // self.shard_size % len(self.hosts)
        asked = {number: ids[host_of == number] for number in np.unique(host_of).tolist()}
        answers = ray.get([self.hosts[number].texts.remote(mine) for number, mine in asked.items()])
        found: dict[int, str] = {}
        for mine, texts in zip(asked.values(), answers, strict=True):
            found.update(zip(mine.tolist(), texts, strict=True))
        return found


def hold(pieces: list[Piece], shard_size: int, plan: Plan, gpus: int) -> Index:
    """Put encoded passages into shards of `shard_size`, on no more actors than the plan has.

    With `gpus`, those of the cluster that may search, there is one for each actor; 0 searches on the CPU.
    Empties `pieces`: the shards hold copies, and Ray's object store is freed as they take them over.
    """
    import ray

    passages = sum(piece.rows for piece in pieces)
    actors = min(plan.workers, -(-passages // shard_size), *([gpus] if gpus else []))
    actor: Any = ray.remote(Host)
    actor = actor.options(num_cpus=plan.cpus, num_gpus=min(gpus, 1), scheduling_strategy="SPREAD")
    index = Index([actor.remote(shard_size, plan.cpus, gpus > 0) for _ in range(actors)], shard_size, passages)
    try:
        with unwrapped():
            _fill(index, pieces)
    except BaseException:
        index.__exit__()
        raise
    return index


def _fill(index: Index, pieces: list[Piece]) -> None:
    import ray

    size, start, added = index.shard_size, 0, []
    for piece in pieces:
        for shard in range(start // size, (start + piece.rows - 1) // size + 1):
            first, last = max(shard * size - start, 0), min((shard + 1) * size - start, piece.rows)
            host = index.hosts[shard % len(index.hosts)]
            added.append(host.add.remote(shard, piece.ref, first, last))
        start += piece.rows
    pieces.clear()
    ray.get(added)
    if sum(ray.get([host.seal.remote() for host in index.hosts])) != index.passages:
        raise RuntimeError(f"the shards do not hold all of {index.passages:,} passages")


def search(
    index: Index, pieces: list[Piece], k: int, batch: int, finish: Callable[..., Any], *extra: Any
) -> Iterator[Any]:
    """What `finish` makes of each block of queries, in order; it runs as a Ray task. Empties `pieces`.

    It is called as finish(table, ids_QK, known_N, *extra): the encoded block; the K = min(k, pool) best
    passages of each query; the passage ids of the rows' known keys one after the other, -1 where there is none.
    `batch` queries are searched at a time; few blocks are under way at once.
    """
    import ray

    task = ray.remote(_finish)

    def submit(piece: Piece) -> Any:
        found = [host.search.remote(piece.ref, k, batch) for host in index.hosts]
        return task.remote(finish, piece.ref, min(k, index.passages), extra, *found)

    blocks = deque(pieces)
    pieces.clear()
    yield from in_order((submit, blocks.popleft()) for _ in range(len(blocks)))


def _finish(finish: Callable[..., Any], table: pa.Table, k: int, extra: Sequence[Any], *found: Any) -> Any:
    _, ids_QK = topk.merge([(scores, ids) for scores, ids, _ in found], k)
    known_N = np.max([known for _, _, known in found], axis=0)
    return finish(table, ids_QK, known_N, *extra)
