"""The pool as shards on Ray actors, and searching it block by block.

Shards and batches of queries are cut by the data alone: scores do not depend on the number of actors. What a block of
queries finds is kept in the store.

Letters in array names: Q queries, K candidates, N passages asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.cli.console import Console
from raybge.cluster.remote_calls import in_order, unwrapped
from raybge.cluster.resources import Plan
from raybge.search import topk
from raybge.search.shards import Host, Kind, Known, Part
from raybge.search.store import Piece, Store, digest

RECALL_QUERIES = 256  # on which an index that is not exact is compared with one that is


@dataclass(frozen=True)
class Found:
    """What a block of queries finds: candidates by score, then id, and the passages of its known keys."""

    table: pa.Table
    scores_QK: np.ndarray
    ids_QK: np.ndarray
    known: Known


@dataclass(frozen=True)
class Index:
    """The pool in shards, held by Ray actors: shard s by hosts[s % len(hosts)]. `with index:` ends them."""

    hosts: Sequence[Any]
    store: Store
    pieces: Sequence[Piece]
    shard_size: int
    held: int
    kind: Kind

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        for host in self.hosts:
            ray.kill(host)
        if not self.store.local:
            _forget_everywhere(self.store)

    @property
    def passages(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    @property
    def shards(self) -> int:
        return -(-self.passages // self.shard_size)

    @property
    def passes(self) -> int:
        """How often all queries are searched for: each time in as many shards as are held at a time."""
        of_a_host = math.ceil(self.shards / len(self.hosts))
        return math.ceil(of_a_host / self.held)

    def covered(self) -> list[int]:
        """How many shards, the first ones, have been searched after each pass."""
        a_pass = self.held * len(self.hosts)
        return [min((turn + 1) * a_pass, self.shards) for turn in range(self.passes)]

    @property
    def identity(self) -> str:
        """Changes when what a search finds would."""
        import faiss

        kind = [faiss.__version__, self.kind.factory, self.kind.gpu]
        return digest("found", [piece.name for piece in self.pieces], self.shard_size, kind)

    def lookup(self) -> Lookup:
        """For texts and scores of passages, from any Ray task or actor."""
        return Lookup(tuple(self.hosts), self.shard_size, self.passages)


@dataclass(frozen=True)
class Lookup:
    """Asks the hosts for single passages."""

    hosts: Sequence[Any]
    shard_size: int
    passages: int

    def texts(self, ids: np.ndarray) -> Mapping[int, str]:
        """The texts of passages by id."""
        ids = np.unique(ids)
        answers = self._ask(ids, lambda host, here: host.texts.remote(ids[here]))
        return {i: text for here, texts in answers for i, text in zip(ids[here].tolist(), texts, strict=True)}

    def names(self, ids: np.ndarray) -> Mapping[int, str]:
        """What passages go by in their corpus, by id; the id itself where that is their text."""
        ids = np.unique(ids)
        answers = self._ask(ids, lambda host, here: host.texts.remote(ids[here], "id"))
        found = {i: name for here, names in answers for i, name in zip(ids[here].tolist(), names, strict=True)}
        return {i: str(i) if name is None else name for i, name in found.items()}

    def scores(self, q_ND: np.ndarray, ids_N: np.ndarray) -> np.ndarray:
        """The inner product of each vector with a passage, (N,)."""
        score_N = np.empty(len(ids_N), np.float32)
        for here, scores in self._ask(ids_N, lambda host, here: host.scores.remote(q_ND[here], ids_N[here])):
            score_N[here] = scores
        return score_N

    def _ask(self, ids_N: np.ndarray, call: Callable[[Any, np.ndarray], Any]) -> list[tuple[np.ndarray, Any]]:
        """What each host that holds any answers, and which of the passages these are."""
        import ray

        host_N = ids_N // self.shard_size % len(self.hosts)
        here = [np.flatnonzero(host_N == number) for number in np.unique(host_N)]
        calls = [call(self.hosts[int(host_N[mine[0]])], mine) for mine in here]
        return list(zip(here, ray.get(calls), strict=True))


def hold(
    pieces: Sequence[Piece], store: Store, shard_size: int, plan: Plan, kind: Kind, held: int, finishes: bool = False
) -> Index:
    """The encoded passages in shards of `shard_size`, on no more actors than the plan has.

    Args:
        held: shards that an actor has in memory at a time.
        finishes: whether the actors also run what comes after a search (`search`, on_hosts).
    """
    shards = layout(pieces, shard_size)
    actors = plan.workers if finishes else min(plan.workers, len(shards))
    hosts: list[Any] = []
    index = Index(hosts, store, tuple(pieces), shard_size, held, kind)
    try:
        with unwrapped():
            for number in range(actors):
                mine = {shard: shards[shard] for shard in range(number, len(shards), actors)}
                actor = _actor().options(num_cpus=plan.cpus, num_gpus=plan.gpus if kind.gpu or finishes else 0)
                hosts.append(actor.remote(store, mine, shard_size, held, kind, plan.cpus))
    except BaseException:
        index.__exit__()
        raise
    return index


def _forget_everywhere(store: Store) -> None:
    """Delete every machine's copies of what the store holds."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(lambda: store.forget()).options(num_cpus=0)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    ray.get(
        [task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True)).remote() for node in nodes]
    )


def layout(pieces: Sequence[Piece], shard_size: int) -> list[list[Part]]:
    """Which rows of which blocks each shard consists of."""
    shards: list[list[Part]] = [[] for _ in range(-(-sum(piece.rows for piece in pieces) // shard_size))]
    start = 0
    for piece in pieces:
        for shard in range(start // shard_size, (start + piece.rows - 1) // shard_size + 1):
            first, last = max(shard * shard_size - start, 0), min((shard + 1) * shard_size - start, piece.rows)
            shards[shard].append(Part(piece.name, first, last))
        start += piece.rows
    return shards


@cache
def _actor() -> Any:
    """A Host as a Ray actor: what others ask for does not wait for a search, or for a Ray task that asks in turn."""
    import ray

    class HostActor(Host):
        texts = ray.method(concurrency_group="lookup")(Host.texts)
        scores = ray.method(concurrency_group="lookup")(Host.scores)
        known = ray.method(concurrency_group="lookup")(Host.known)

        @ray.method(concurrency_group="finish")
        def finish(self, *given: Any) -> Any:
            """`_finish` where a model that it needs may stay loaded."""
            return _finish(*given)

    return ray.remote(
        max_restarts=-1,
        max_task_retries=-1,
        concurrency_groups={"lookup": 2, "finish": 1},
        scheduling_strategy="SPREAD",
    )(HostActor)


# --- searching --------------------------------------------------------------------------------------------


def search(
    index: Index,
    pieces: Sequence[Piece],
    k: int,
    batch: int,
    finish: Callable[..., Any],
    *extra: Any,
    on_hosts: bool = False,
) -> Iterator[Any]:
    """What `finish` makes of each block of queries, in order; it runs as a Ray task, as finish(found, *extra), or
    `on_hosts`, where a model that it needs stays loaded.

    K = min(k, pool) candidates; `batch` queries are searched at a time; few blocks are under way at once. With several
    passes nothing comes before the last.
    """
    import ray

    k = min(k, index.passages)
    task = ray.remote(_finish).options(max_retries=-1)
    # A pass goes on with the shards behind those of the pass before: what is found has the name of all up to there.
    names = [digest(index.identity, k, batch, covered) for covered in index.covered()]

    def submit(turn: int, number: int, piece: Piece) -> Any:
        last = turn == index.passes - 1
        done, name = digest(names[-1], piece.name), digest(names[turn], piece.name)
        if index.store.has(done):
            name = done
        if index.store.has(name):
            found: list[Any] = []
        else:
            found = [host.search.remote(turn, piece.name, k, batch) for host in index.hosts]
        before = digest(names[turn - 1], piece.name) if turn and found else None
        known = [host.known.remote(piece.name) for host in index.hosts] if last else []
        finishing = finish if last else None
        run = index.hosts[number % len(index.hosts)].finish if on_hosts and last else task
        return run.remote(index.store, piece.name, name, before, k, finishing, extra, len(found), *found, *known)

    for turn in range(index.passes):
        for result in in_order((submit, turn, number, piece) for number, piece in enumerate(pieces)):
            if turn == index.passes - 1:
                yield result


def _finish(
    store: Store,
    block: str,
    name: str,
    before: str | None,
    k: int,
    finish: Callable[..., Any] | None,
    extra: Sequence[Any],
    count: int,
    *given: Any,
) -> Any:
    """Merge and keep what the hosts found, and what earlier passes did; then `finish`."""
    if count:
        lists = list(given[:count])
        if before:
            earlier = store.arrays(before)
            lists.append((earlier["scores_QK"], earlier["ids_QK"]))
        scores_QK, ids_QK = topk.merge(lists, k)
        store.write_arrays(name, scores_QK=scores_QK, ids_QK=ids_QK)
    if finish is None:
        return None
    if not count:
        kept = store.arrays(name)
        scores_QK, ids_QK = kept["scores_QK"], kept["ids_QK"]
    return finish(Found(store.table(block), scores_QK, ids_QK, Known.of(given[count:])), *extra)


def say_recall(index: Index, pieces: Sequence[Piece], k: int, batch: int, console: Console) -> dict[str, float]:
    """For an index that is not exact: the share of the K best that it finds, on the first queries, as `recall`."""
    if index.kind.exact:
        return {}
    asked, rows = [], 0
    for piece in pieces:
        if rows < RECALL_QUERIES:
            asked.append(piece)
            rows += piece.rows
    k = min(k, index.passages)
    hits, wanted = np.sum(list(search(index, asked, k, batch, _compare, index.lookup(), k)), axis=0).tolist()
    console.info(f"--index_factory {index.kind.factory} finds {hits / wanted:.1%} of the {k:,} nearest passages")
    return {"recall": round(hits / wanted, 6)}


def _compare(found: Found, lookup: Lookup, k: int) -> tuple[int, int]:
    """How many of the exact candidates were found, and how many there are."""
    import ray

    from raybge.search.shards import vectors_of

    q_QD = vectors_of(found.table)[:RECALL_QUERIES]
    lists = ray.get([host.search_exactly.remote(q_QD, k) for host in lookup.hosts])
    _, exact_QK = topk.merge(lists, k)
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(exact_QK, found.ids_QK[: len(q_QD)], strict=True))
    return hits, exact_QK.size
