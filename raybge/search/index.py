"""Sharded index on Ray actors, and search of query blocks in it.

Shards and batches of queries are cut by the data alone: scores do not depend on the number of actors. The candidates of
a block of queries are kept in the store.

Letters in array names: Q queries, K candidates, N passages.
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
from raybge.cluster.remote_calls import results_in_order, unwrap_user_errors
from raybge.cluster.resources import Plan
from raybge.search import topk
from raybge.search.columns import vectors_of
from raybge.search.shards import BlockSlice, KnownPassages, ShardSearcher
from raybge.search.spec import IndexSpec
from raybge.search.store import EncodedBlock, Store
from raybge.util.digest import digest

RECALL_QUERIES = 256  # queries on which an approximate index is compared with exact search


@dataclass(frozen=True)
class SearchHits:
    """Result of a search for one block of queries.

    Args:
        table: the encoded queries.
        scores_QK: scores of the candidates, descending.
        ids_QK: passage ids of the candidates; -1 for none.
        known: passages that have a known key of the queries.
        name: name of the encoded queries in the store.
    """

    table: pa.Table
    scores_QK: np.ndarray
    ids_QK: np.ndarray
    known: KnownPassages
    name: str = ""


@dataclass(frozen=True)
class ShardedIndex:
    """Pool in shards on Ray actors: shard s is on actors[s % len(actors)]. `with index:` ends the actors.

    Args:
        actors: handles of `ShardSearcher` actors.
        store: holds the blocks.
        blocks: encoded passages, in order.
        spec: index type and sizes.
        resident_shards: shards that an actor holds in memory at a time.
    """

    actors: Sequence[Any]
    store: Store
    blocks: Sequence[EncodedBlock]
    spec: IndexSpec
    resident_shards: int

    def __enter__(self) -> ShardedIndex:
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)
        if not self.store.local:
            _remove_local_copies(self.store)

    @property
    def passages(self) -> int:
        """Number of passages."""
        return sum(block.rows for block in self.blocks)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.passages // self.spec.shard_size)

    @property
    def passes(self) -> int:
        """Number of passes over the queries: each pass searches the shards that are in memory at a time."""
        return math.ceil(math.ceil(self.shards / len(self.actors)) / self.resident_shards)

    def covered_shards(self) -> list[int]:
        """Return how many shards, counted from the first, have been searched after each pass."""
        shards_per_pass = self.resident_shards * len(self.actors)
        return [min((number + 1) * shards_per_pass, self.shards) for number in range(self.passes)]

    @property
    def identity(self) -> str:
        """Digest of everything that the candidates depend on besides the queries."""
        import faiss

        kind = [faiss.__version__, self.spec.factory, self.spec.gpu]
        return digest("candidates", [block.name for block in self.blocks], self.spec.shard_size, kind)

    def lookup(self) -> PassageLookup:
        """Return access to texts and scores of single passages, usable in any Ray task or actor."""
        return PassageLookup(tuple(self.actors), self.spec.shard_size, self.passages)


@dataclass(frozen=True)
class PassageLookup:
    """Texts and scores of single passages, fetched from the actors that hold them."""

    actors: Sequence[Any]
    shard_size: int
    passages: int

    def texts(self, ids: np.ndarray) -> Mapping[int, str]:
        """Return the texts of passages by id."""
        ids = np.unique(ids)
        parts = self._fetch(ids, lambda actor, here: actor.texts.remote(ids[here]))
        return {i: text for here, texts in parts for i, text in zip(ids[here].tolist(), texts, strict=True)}

    def names(self, ids: np.ndarray) -> Mapping[int, str]:
        """Return the corpus ids of passages by passage id; the passage id itself for a corpus without ids."""
        ids = np.unique(ids)
        parts = self._fetch(ids, lambda actor, here: actor.texts.remote(ids[here], "id"))
        names = {i: name for here, names in parts for i, name in zip(ids[here].tolist(), names, strict=True)}
        return {i: str(i) if name is None else name for i, name in names.items()}

    def scores(self, q_ND: np.ndarray, ids_N: np.ndarray) -> np.ndarray:
        """Return the inner product of each vector with a passage, (N,) float32."""
        score_N = np.empty(len(ids_N), np.float32)
        for here, scores in self._fetch(ids_N, lambda actor, here: actor.scores.remote(q_ND[here], ids_N[here])):
            score_N[here] = scores
        return score_N

    def _fetch(self, ids_N: np.ndarray, call: Callable[[Any, np.ndarray], Any]) -> list[tuple[np.ndarray, Any]]:
        """Return (positions in `ids_N`, result) of each actor that holds any of the passages."""
        import ray

        actor_N = ids_N // self.shard_size % len(self.actors)
        positions = [np.flatnonzero(actor_N == number) for number in np.unique(actor_N)]
        calls = [call(self.actors[int(actor_N[here[0]])], here) for here in positions]
        return list(zip(positions, ray.get(calls), strict=True))


def build_index(
    blocks: Sequence[EncodedBlock],
    store: Store,
    spec: IndexSpec,
    plan: Plan,
    resident_shards: int,
    process_on_actors: bool = False,
) -> ShardedIndex:
    """Distribute the encoded passages over Ray actors, at most `plan.workers`.

    Args:
        blocks: encoded passages, in order.
        store: holds the blocks.
        spec: index type and sizes.
        plan: actors and their resources.
        resident_shards: shards that an actor holds in memory at a time.
        process_on_actors: the actors also run the processing after a search (`search`, `on_actors`).

    Returns:
        The index.
    """
    shards = shard_layout(blocks, spec.shard_size)
    count = plan.workers if process_on_actors else min(plan.workers, len(shards))
    gpus = plan.gpus if spec.gpu or process_on_actors else 0
    actors: list[Any] = []
    index = ShardedIndex(actors, store, tuple(blocks), spec, resident_shards)
    try:
        with unwrap_user_errors():
            for number in range(count):
                own = {shard: shards[shard] for shard in range(number, len(shards), count)}
                actor = _actor_class(2 if gpus and process_on_actors else 1).options(num_cpus=plan.cpus, num_gpus=gpus)
                actors.append(actor.remote(store, own, spec.shard_size, resident_shards, spec.kind, plan.cpus))
    except BaseException:
        index.__exit__()
        raise
    return index


def _remove_local_copies(store: Store) -> None:
    """Delete every node's copies of the store's files."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(lambda: store.remove_local_copies()).options(num_cpus=0)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    ray.get(
        [task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True)).remote() for node in nodes]
    )


def shard_layout(blocks: Sequence[EncodedBlock], shard_size: int) -> list[list[BlockSlice]]:
    """Return the block slices of each shard."""
    shards: list[list[BlockSlice]] = [[] for _ in range(-(-sum(block.rows for block in blocks) // shard_size))]
    start = 0
    for block in blocks:
        for shard in range(start // shard_size, (start + block.rows - 1) // shard_size + 1):
            first, last = max(shard * shard_size - start, 0), min((shard + 1) * shard_size - start, block.rows)
            shards[shard].append(BlockSlice(block.name, first, last))
        start += block.rows
    return shards


@cache
def _actor_class(processing: int) -> Any:
    """Return `ShardSearcher` as a Ray actor: lookups do not wait for a search, or for a task that looks up in turn.

    Args:
        processing: blocks that it processes at a time: with a model on a GPU two, one of which prepares its input.

    Returns:
        The actor class.
    """
    import ray

    class SearchActor(ShardSearcher):
        texts = ray.method(concurrency_group="lookup")(ShardSearcher.texts)
        scores = ray.method(concurrency_group="lookup")(ShardSearcher.scores)
        known = ray.method(concurrency_group="lookup")(ShardSearcher.known)

        process = ray.method(concurrency_group="process")(_process_on_actor)

    return ray.remote(
        max_restarts=-1,
        max_task_retries=-1,
        concurrency_groups={"lookup": 2, "process": processing},
        scheduling_strategy="SPREAD",
    )(SearchActor)


# --- searching --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SearchStep:
    """Processing of one block of queries after one pass.

    Args:
        store: holds blocks and candidates.
        block: name of the block of queries.
        candidates: name of the candidates after this pass.
        earlier: name of the candidates after the pass before; None for the first pass or if nothing was searched.
        k: number of candidates.
        searches: number of search results that are passed; 0 if the candidates are in the store.
        process: function of the last pass; None otherwise.
        extra: its further arguments.
    """

    store: Store
    block: str
    candidates: str
    earlier: str | None
    k: int
    searches: int
    process: Callable[..., Any] | None
    extra: Sequence[Any]


def search(
    index: ShardedIndex,
    queries: Sequence[EncodedBlock],
    k: int,
    process: Callable[..., Any],
    *extra: Any,
    on_actors: bool = False,
) -> Iterator[Any]:
    """Search all blocks of queries and process the candidates of each in a Ray task.

    Only a few blocks are in progress at a time. With several passes nothing is processed before the last one.

    Args:
        index: the index.
        queries: blocks of queries.
        k: number of candidates; at most the whole pool is returned.
        process: called as process(hits: SearchHits, *extra).
        *extra: its further arguments.
        on_actors: run `process` on the search actors, where a model that it needs stays loaded.

    Yields:
        The result of `process` for each block, in order.
    """
    import ray

    k, batch = min(k, index.passages), index.spec.batch
    task = ray.remote(_process).options(max_retries=-1)
    # A pass continues with the shards after those of the pass before: candidates are named by all shards so far.
    names = [digest(index.identity, k, batch, covered) for covered in index.covered_shards()]

    def submit(pass_number: int, number: int, block: EncodedBlock) -> Any:
        last = pass_number == index.passes - 1
        final, name = digest(names[-1], block.name), digest(names[pass_number], block.name)
        if index.store.has(final):
            name = final
        searches: list[Any] = []
        if not index.store.has(name):
            searches = [actor.search.remote(pass_number, block.name, k, batch) for actor in index.actors]
        earlier = digest(names[pass_number - 1], block.name) if pass_number and searches else None
        known = [actor.known.remote(block.name) for actor in index.actors] if last else []
        step = _SearchStep(
            index.store, block.name, name, earlier, k, len(searches), process if last else None, extra if last else ()
        )
        run = index.actors[number % len(index.actors)].process if on_actors and last else task
        return run.remote(step, *searches, *known)

    for pass_number in range(index.passes):
        calls = ((submit, pass_number, number, block) for number, block in enumerate(queries))
        for result in results_in_order(calls):
            if pass_number == index.passes - 1:
                yield result


def _process_on_actor(actor: object, step: _SearchStep, *results: Any) -> Any:
    """Run `_process` as a method of a search actor."""
    return _process(step, *results)


def _process(step: _SearchStep, *results: Any) -> Any:
    """Merge the actors' candidates with those of earlier passes, store them, and process them after the last pass."""
    store = step.store
    if step.searches:
        lists = list(results[: step.searches])
        if step.earlier:
            earlier = store.arrays(step.earlier)
            lists.append((earlier["scores_QK"], earlier["ids_QK"]))
        scores_QK, ids_QK = topk.merge(lists, step.k)
        store.write_arrays(step.candidates, scores_QK=scores_QK, ids_QK=ids_QK)
    if step.process is None:
        return None
    if not step.searches:
        stored = store.arrays(step.candidates)
        scores_QK, ids_QK = stored["scores_QK"], stored["ids_QK"]
    known = KnownPassages.concatenate(results[step.searches :])
    return step.process(SearchHits(store.table(step.block), scores_QK, ids_QK, known, step.block), *step.extra)


def report_recall(index: ShardedIndex, queries: Sequence[EncodedBlock], k: int, console: Console) -> dict[str, float]:
    """Measure the recall of an approximate index against exact search on the first queries, and print it.

    Args:
        index: the index.
        queries: blocks of queries.
        k: number of candidates.
        console: prints the recall.

    Returns:
        {"recall": share of the exact K best that the index finds}; empty for an exact index.
    """
    if index.spec.kind.exact:
        return {}
    sample: list[EncodedBlock] = []
    for block in queries:
        if sum(each.rows for each in sample) < RECALL_QUERIES:
            sample.append(block)
    k = min(k, index.passages)
    counts = list(search(index, sample, k, _compare_with_exact, index.lookup(), k))
    hits, total = np.sum(counts, axis=0).tolist()
    console.info(f"--index_factory {index.spec.factory} finds {hits / total:.1%} of the {k:,} nearest passages")
    return {"recall": round(hits / total, 6)}


def _compare_with_exact(hits: SearchHits, lookup: PassageLookup, k: int) -> tuple[int, int]:
    """Return how many of the exact candidates were found, and their number."""
    import ray

    q_QD = vectors_of(hits.table)[:RECALL_QUERIES]
    lists = ray.get([actor.search_exactly.remote(q_QD, k) for actor in lookup.actors])
    _, exact_QK = topk.merge(lists, k)
    common = sum(len(np.intersect1d(a, b)) for a, b in zip(exact_QK, hits.ids_QK[: len(q_QD)], strict=True))
    return common, exact_QK.size
