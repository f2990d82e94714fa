"""Encoding of passages and queries on Ray Data actors, block by block, into the store.

Blocks are cut by the data alone, never by the number of actors, so that the vectors are the same for any number of
them. Texts and vectors never pass through the driver: it holds a name and a number per block. A block that is in the
store is not encoded again, so an interrupted run continues.

Letters in array names: B blocks, N texts, D width of a vector.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.cli.console import Console
from raybge.cluster.remote_calls import unwrap_user_errors
from raybge.cluster.resources import Plan
from raybge.data.ray_datasets import BlockRead, batches_of, dataset_of_reads
from raybge.search.block_reader import READ, block_readers
from raybge.search.embedder import Embedder, device_of, finite_vectors
from raybge.search.saved_vectors import SavedEmbeddings
from raybge.search.search_data import SearchData
from raybge.search.store import EncodedBlock, Store, table_digest

LOADING = "starting workers, loading the model"  # until the first block is encoded


def encode(
    data: SearchData,
    embedder: Embedder,
    store: Store,
    plan: Plan,
    console: Console,
    saved: SavedEmbeddings | None = None,
) -> tuple[list[EncodedBlock], list[EncodedBlock]]:
    """Encode the distinct passages and all queries on `plan.workers` actors, into the store.

    Args:
        data: pool and queries.
        embedder: the model.
        store: receives the blocks: tables of `ENCODED` with `vector`.
        plan: actors and their resources.
        console: shows the progress.
        saved: vectors of the passages, used instead of encoding them.

    Returns:
        The blocks of passages and of queries, in order.
    """
    import ray

    readers = block_readers(data)
    # One dataset of passages and queries, so that the actors load the model once; Ray's `union` would mix their blocks.
    dataset = dataset_of_reads([BlockRead(read, size) for read, size in readers], READ)
    unique_B = data.unique.unique_B
    saved_blocks = SavedBlocks(saved, np.cumsum(unique_B) - unique_B) if saved else None
    encoded = dataset.map_batches(
        EncodingActor,
        fn_constructor_args=(embedder, store, device_of(plan), saved_blocks),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(plan.workers, len(readers))),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus,
    )
    blocks: dict[int, EncodedBlock] = {}
    progress = console.bar("encode", data.texts, "text", start_up=LOADING)
    with unwrap_user_errors(), progress as bar, batches_of(encoded) as batches:
        for batch in batches:
            for result in batch.to_pylist():
                blocks[result["block"]] = EncodedBlock(result["name"], result["rows"], result["texts"])
                bar.update(result["rows"], result["seconds"])
    border = len(data.passages.survey.blocks)
    passages = [blocks[number] for number in sorted(blocks) if number < border and blocks[number].rows]
    queries = [blocks[number] for number in sorted(blocks) if number >= border and blocks[number].rows]
    counts = sum(block.rows for block in passages), sum(block.rows for block in queries)
    expected = data.unique.passages, data.queries.survey.total_rows
    if counts != expected:
        raise RuntimeError(f"encoded {counts} passages and queries, expected {expected}")
    return passages, queries


@dataclass(frozen=True)
class SavedBlocks:
    """Saved vectors of all passages, and the row of the first passage of each block."""

    embeddings: SavedEmbeddings
    start_B: np.ndarray


class EncodingActor:
    """Ray Data actor: encodes a block of `READ` into the store and returns its name.

    The model is loaded at the first block that is not in the store.
    """

    def __init__(self, embedder: Embedder, store: Store, device: str, saved: SavedBlocks | None = None) -> None:
        """Remember the model; nothing is loaded yet.

        Args:
            embedder: the model.
            store: receives the blocks.
            device: torch device.
            saved: vectors of the passages, used instead of encoding them.
        """
        self._embedder, self._store, self._device, self._saved = embedder, store, device, saved
        self._encoder: Any = None

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode one block; an empty one has no result. `seconds` do not contain the loading of the model."""
        if not len(table):
            empty = pa.array([], pa.string())
            seconds = pa.array([], pa.float64())
            return pa.table(
                {"block": pa.array([], pa.int64()), "name": empty, "rows": [], "texts": empty, "seconds": seconds}
            )
        number = table["block"][0].as_py()
        table = table.drop_columns(["block"])
        texts = table_digest(table.select(["text", "id"]))
        vectors_ND, source = self._saved_vectors(number, len(table))
        name = table_digest(table, self._embedder.identity, source)
        start = time.monotonic()
        if not self._store.has(name):
            if vectors_ND is None:
                self._load()
                start = time.monotonic()
            self._store.write_table(name, self.encoded(table, vectors_ND))
        seconds = time.monotonic() - start
        return pa.table(
            {"block": [number], "name": [name], "rows": [len(table)], "texts": [texts], "seconds": [seconds]}
        )

    def _saved_vectors(self, number: int, rows: int) -> tuple[np.ndarray | None, str]:
        """Return a block's saved vectors and the digest of their texts; (None, "") without."""
        if self._saved is None or number >= len(self._saved.start_B):
            return None, ""
        embeddings = self._saved.embeddings
        return embeddings.vectors(int(self._saved.start_B[number]), rows), embeddings.texts

    def encoded(self, table: pa.Table, vectors_ND: np.ndarray | None = None) -> pa.Table:
        """Return a block with its vectors: the given ones, or the model's."""
        if vectors_ND is None:
            self._load()
        queries, prompts = table["query"].to_pylist(), table["prompt"].to_pylist()
        if vectors_ND is not None:
            vectors_ND = finite_vectors(vectors_ND)
        elif queries[0] is not None:
            texts = [self._instructions.query_text(q, p) for q, p in zip(queries, prompts, strict=True)]
            vectors_ND = finite_vectors(self._encoder.encode_queries(texts, convert_to_numpy=True))
        else:
            vectors_ND = self.passage_vectors(table["text"].to_pylist())
        positives = table["positives"].combine_chunks()
        flat = pa.array(vectors_ND.ravel(), pa.float32())
        table = table.drop_columns(["query", "prompt", "positives"])
        table = table.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1]))
        if positives.null_count == 0:
            row_N = np.repeat(np.arange(len(table)), positives.value_lengths().to_numpy())
            scores = np.einsum("nd,nd->n", vectors_ND[row_N], self.passage_vectors(positives.flatten().to_pylist()))
            scores = pa.LargeListArray.from_arrays(positives.offsets, pa.array(scores, pa.float32()))
            table = table.append_column("pos_scores", scores)
        return table

    def passage_vectors(self, texts: list[str]) -> np.ndarray:
        """Return the vectors of passages, (N, D) float32."""
        self._load()
        instructed = [self._instructions.passage_text(text) for text in texts]
        return finite_vectors(self._encoder.encode_corpus(instructed, convert_to_numpy=True))

    def _load(self) -> None:
        """Load the model if it is not loaded."""
        if self._encoder is not None:
            return
        from raybge.data.prompts import Instructions

        self._encoder = self._embedder.load(self._device)
        # applied here and not by the encoder, since a row may have a prompt of its own
        self._instructions = self._encoder.instructions
        self._encoder.instructions = Instructions(query="", passage="")
