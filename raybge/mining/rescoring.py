"""Rescoring: candidates of a cheap model get the scores of the same model in fp32, before any of them is chosen.

Each distinct candidate, and each query, is encoded once, block by block into the store. The driver holds a bit per
passage and a name per block; scores are computed for a block of queries at a time.

Letters in array names: Q queries, K candidates, M pairs of a query and a passage, N passages, D width of a vector.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa

from raybge.cli.console import Console
from raybge.cluster.remote_calls import unwrap_user_errors
from raybge.cluster.resources import Plan
from raybge.data.groups import parse_group
from raybge.data.ray_datasets import BlockRead, batches_of, dataset_of_reads
from raybge.search import topk
from raybge.search.actor_pool import map_on_actors
from raybge.search.columns import keys_of, vectors_column, vectors_of
from raybge.search.embedder import Embedder, TextEncoder, device_of
from raybge.search.index import PassageLookup, SearchHits, ShardedIndex, search
from raybge.search.pipeline import LOADING, EncodingActor
from raybge.search.store import EncodedBlock, Store, table_digest
from raybge.util.digest import digest

MARGIN = 4  # a quarter more candidates than ranks: fp32 moves some of them into the range
PAIRS = 16_384  # whose vectors are multiplied together
# A block to encode: its name, that of the result, and the numbers of its rows; null for a block of queries.
_WORK = pa.schema([("source", pa.string()), ("target", pa.string()), ("rows", pa.list_(pa.int32()))])
_MODELS: dict[str, TextEncoder] = {}  # of this process, by identity


def search_depth(hi: int) -> int:
    """Return the number of candidates to search for ranks below `hi`."""
    return hi + max(16, hi // MARGIN)


def rescore_candidates(
    index: ShardedIndex, queries: Sequence[EncodedBlock], depth: int, exact: Embedder, plan: Plan, console: Console
) -> Rescorer:
    """Encode the queries, their candidates and their known passages in fp32.

    Args:
        index: the cheap model's index; it is closed, since its actors would hold the CPUs or GPUs of the model in fp32.
        queries: the cheap model's blocks of queries.
        depth: candidates per query.
        exact: the model in fp32.
        plan: actors and their resources.
        console: shows the progress.

    Returns:
        The scorer of candidates.
    """
    needed = np.zeros(-(-index.passages // 8), np.uint8)  # a bit per passage
    total = sum(block.rows for block in queries)
    with index, console.bar("search", total, "row", start_up="loading the index") as bar:
        for block, ids in zip(queries, search(index, queries, depth, _passages_of), strict=True):
            np.bitwise_or.at(needed, ids >> 3, (1 << (ids & 7)).astype(np.uint8))
            bar.update(block.rows)
    works = [pa.table([[block.name], [_target(exact, block.name)], [None]], schema=_WORK) for block in queries]
    starts, targets, start = [], [], 0
    for block in index.blocks:
        bits = np.unpackbits(needed[start >> 3 : -(-(start + block.rows) // 8)], bitorder="little")
        rows = np.flatnonzero(bits[start & 7 : (start & 7) + block.rows]).astype(np.int32)
        starts.append(start)
        targets.append(_target(exact, block.name, rows.tolist()))
        start += block.rows
        if len(rows):
            works.append(pa.table([[block.name], targets[-1:], [rows]], schema=_WORK))
    _encode(works, total + int(np.unpackbits(needed).sum()), exact, index.store, plan, console)
    places = pa.table({"start": pa.array(starts, pa.int64()), "name": pa.array(targets, pa.string())})
    manifest = table_digest(places)
    index.store.write_table(manifest, places)
    return Rescorer(exact, index.store, manifest, device_of(plan))


def _target(exact: Embedder, name: str, rows: Sequence[int] | None = None) -> str:
    return digest("rescored", exact.identity, name, rows)


def _passages_of(hits: SearchHits) -> np.ndarray:
    """Return the passages that a block of queries needs: candidates, positives and other known ones."""
    ids = np.union1d(hits.ids_QK, hits.known.id_M)
    return ids[ids >= 0]


def _encode(works: list[pa.Table], texts: int, exact: Embedder, store: Store, plan: Plan, console: Console) -> None:
    dataset = dataset_of_reads([BlockRead(partial(list, [work])) for work in works], _WORK)
    encoded = map_on_actors(dataset, RescoringActor, (exact, store, device_of(plan)), plan, blocks=len(works))
    progress = console.bar("rescore", texts, "text", start_up=LOADING)
    with unwrap_user_errors(), progress as bar, batches_of(encoded) as batches:
        for batch in batches:
            for count in batch["texts"].to_pylist():
                bar.update(count)


class RescoringActor:
    """Ray Data actor: encodes a block of queries, or some passages of a block, in fp32 into the store."""

    def __init__(self, exact: Embedder, store: Store, device: str) -> None:
        """Remember the model; it is loaded at the first block that is not in the store.

        Args:
            exact: the model in fp32.
            store: holds the blocks.
            device: torch device.
        """
        self._store, self._encoder = store, EncodingActor(exact, store, device)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode one block of `_WORK`; returns the number of its texts."""
        [work] = table.to_pylist()
        source = self._store.table(work["source"])
        rows = work["rows"]
        if not self._store.has(work["target"]):
            if rows is None:
                encoded = self._queries(source)
            else:
                texts = source["text"].take(pa.array(rows, pa.int32())).to_pylist()
                vectors = vectors_column(self._encoder.passage_vectors(texts))
                encoded = pa.table({"row": pa.array(rows, pa.int32()), "vector": vectors})
            self._store.write_table(work["target"], encoded)
        return pa.table({"texts": [len(source) if rows is None else len(rows)]})

    def _queries(self, source: pa.Table) -> pa.Table:
        """Return a block of queries with their vectors in fp32, and the scores of positives if it had any."""
        groups = [parse_group(json.loads(text)) for text in source["text"].to_pylist()]
        positives = [group.pos if "pos_scores" in source.column_names else None for group in groups]
        columns = {
            "query": pa.array([group.query for group in groups], pa.large_string()),
            "prompt": pa.array([group.prompt for group in groups], pa.large_string()),
            "positives": pa.array(positives, pa.large_list(pa.large_string())),
        }
        table = source.drop_columns([name for name in ("vector", "pos_scores") if name in source.column_names])
        for name, column in columns.items():
            table = table.append_column(name, column)
        return self._encoder.encoded(table)


@dataclass(frozen=True)
class Rescorer:
    """Scores in fp32 of pairs of a query and a passage.

    Args:
        exact: the model in fp32, for passages that were no candidates.
        store: holds the vectors.
        manifest: table in the store: first passage and name of each block of vectors.
        device: torch device of the model.
    """

    exact: Embedder
    store: Store
    manifest: str
    device: str

    def rescored(self, hits: SearchHits, ranks: int) -> SearchHits:
        """Return hits with fp32 vectors, and with candidates by fp32 score, then passage id.

        Args:
            hits: search result of the cheap model.
            ranks: number of candidates to keep.

        Returns:
            The hits.
        """
        table = self.store.table(_target(self.exact, hits.name))
        q_QD, known = vectors_of(table), hits.known
        queries, candidates = hits.ids_QK.shape
        _, counts = keys_of(table)
        row_K = np.repeat(np.arange(queries), counts)  # of each known key
        row_M = np.concatenate([np.repeat(np.arange(queries), candidates), row_K[known.key_M]])
        id_M = np.concatenate([hits.ids_QK.ravel(), known.id_M])
        score_M = np.full(len(id_M), -np.inf, np.float32)
        filled_M = id_M >= 0
        score_M[filled_M], missing = self._scores(q_QD, row_M[filled_M], id_M[filled_M])
        assert not missing.any()
        scores_QK = score_M[: hits.ids_QK.size].reshape(hits.ids_QK.shape)
        scores_QK, ids_QK = topk.top(scores_QK, hits.ids_QK, ranks)
        known = replace(known, score_M=score_M[hits.ids_QK.size :])
        return SearchHits(table, scores_QK, ids_QK, known, hits.name)

    def scores(self, lookup: PassageLookup, q_MD: np.ndarray, id_M: np.ndarray) -> np.ndarray:
        """Return the fp32 scores of pairs; passages that were no candidates are encoded.

        Args:
            lookup: texts of passages.
            q_MD: vector of each pair's query.
            id_M: its passage.

        Returns:
            score_M.
        """
        score_M, missing_M = self._scores(q_MD, np.arange(len(id_M)), id_M)
        if missing_M.any():
            # sorted, since the order depends on the number of actors
            texts = dict(sorted(lookup.texts(id_M[missing_M]).items()))
            name = digest("rescored", self.exact.identity, list(texts.values()))
            if not self.store.has(name):
                model = _MODELS.setdefault(self.exact.identity, TextEncoder(self.exact, self.device))
                self.store.write_arrays(name, vectors_ND=model(list(texts.values()), "passage"))
            place = {passage: row for row, passage in enumerate(texts)}
            rows = [place[passage] for passage in id_M[missing_M].tolist()]
            p_MD = self.store.arrays(name)["vectors_ND"][rows]
            score_M[missing_M] = np.einsum("md,md->m", q_MD[missing_M], p_MD)
        return score_M

    def _scores(self, q_QD: np.ndarray, row_M: np.ndarray, id_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (score_M, missing_M): scores of the passages that have a vector in the store, and which have none."""
        score_M, missing_M = np.full(len(id_M), np.nan, np.float32), np.ones(len(id_M), bool)
        for part, table, first in self._blocks(id_M):
            rows = table["row"].to_numpy()
            place = np.minimum(np.searchsorted(rows, id_M[part] - first), len(rows) - 1)
            stored = rows[place] == id_M[part] - first
            part, place = part[stored], place[stored]
            vectors_ND = vectors_of(table)
            for at in range(0, len(part), PAIRS):
                pairs, places = part[at : at + PAIRS], place[at : at + PAIRS]
                score_M[pairs] = np.einsum("md,md->m", q_QD[row_M[pairs]], vectors_ND[places])
            missing_M[part] = False
        return score_M, missing_M

    def _blocks(self, id_M: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table, int]]:
        """Yield (positions in `id_M`, table, id of the block's first passage) of each block with vectors."""
        manifest = self.store.table(self.manifest)
        start_B = manifest["start"].to_numpy()
        block_M = np.searchsorted(start_B, id_M, side="right") - 1
        order = np.argsort(block_M, kind="stable")
        bounds = np.flatnonzero(np.diff(block_M[order])) + 1
        for part in np.split(order, bounds) if len(order) else ():
            block = int(block_M[part[0]])
            name = manifest["name"][block].as_py()
            if self.store.has(name):
                yield part, self.store.table(name), int(start_B[block])


def changed_ranks(before_QK: np.ndarray, after_QK: np.ndarray) -> tuple[int, int]:
    """Return (ranks that hold another passage, ranks that hold one)."""
    filled = after_QK >= 0
    return int((filled & (before_QK[:, : after_QK.shape[1]] != after_QK)).sum()), int(filled.sum())
