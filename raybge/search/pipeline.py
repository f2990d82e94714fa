"""Encoding of passages and queries on Ray Data actors, block by block, into the store.

Blocks are cut by the data alone, never by the number of actors, so that the vectors are the same for any number of
them. Texts and vectors never pass through the driver: it holds a name and a number per block. A block that is in the
store is not encoded again, so an interrupted run continues. Ahead of actors with a GPU, the tasks that read also
tokenize.

Letters in array names: B blocks, N texts, D width of a vector.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raybge.cli.console import Console
from raybge.cluster.remote_calls import unwrap_user_errors
from raybge.cluster.resources import Plan
from raybge.data.prompts import Instructions
from raybge.data.ray_datasets import BlockRead, batches_of, dataset_of_reads
from raybge.model.spec import EncoderSpec
from raybge.search.actor_pool import TOKENS, map_on_actors, task_tokenizer, tokens_column, tokens_of
from raybge.search.block_reader import READ, block_readers
from raybge.search.embedder import (
    Embedder,
    TextEncoder,
    device_of,
    finite_vectors,
    padding_message,
)
from raybge.search.saved_vectors import SavedEmbeddings
from raybge.search.search_data import SearchData
from raybge.search.store import EncodedBlock, Store, table_digest

POSITIVE_TOKENS = "positive_tokens"  # column of the token ids of each query's positives
_RESULT = pa.schema(
    [
        ("block", pa.int64()),
        ("name", pa.string()),
        ("rows", pa.int64()),
        ("texts", pa.string()),
        ("seconds", pa.float64()),
        ("note", pa.string()),  # a line for the user
    ]
)
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
    readers = block_readers(data)
    # One dataset of passages and queries, so that the actors load the model once; Ray's `union` would mix their blocks.
    dataset = dataset_of_reads([BlockRead(read, size) for read, size in readers], READ)
    unique_B = data.unique.unique_B
    saved_blocks = SavedBlocks(saved, np.cumsum(unique_B) - unique_B) if saved else None
    if embedder.tokenized:
        tokenizing = BlockEncoding(embedder, store, saved_blocks), embedder.tokenized
        dataset = dataset.map_batches(tokenize_block, fn_args=tokenizing, batch_size=None, batch_format="pyarrow")
    encoded = map_on_actors(
        dataset, EncodingActor, (embedder, store, device_of(plan), saved_blocks), plan, len(readers)
    )
    blocks: dict[int, EncodedBlock] = {}
    notes: set[str] = set()
    progress = console.bar("encode", data.texts, "text", start_up=LOADING)
    with unwrap_user_errors(), progress as bar, batches_of(encoded) as batches:
        for batch in batches:
            for result in batch.to_pylist():
                blocks[result["block"]] = EncodedBlock(result["name"], result["rows"], result["texts"])
                bar.update(result["rows"], result["seconds"])
                notes |= {result["note"]} - {None}
    for note in sorted(notes):
        console.info(note)
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


@dataclass(frozen=True)
class BlockEncoding:
    """Encoding of blocks of `READ`: how they are named in the store, and which vectors are saved.

    Args:
        embedder: the model.
        store: receives the blocks.
        saved: vectors of the passages, used instead of encoding them.
    """

    embedder: Embedder
    store: Store
    saved: SavedBlocks | None = None

    def name(self, table: pa.Table) -> str:
        """Return the name of a block in the store."""
        source = "" if self.saved is None or not self.is_saved(table) else self.saved.embeddings.texts
        return table_digest(table.drop_columns(["block"]), self.embedder.identity, source)

    def is_saved(self, table: pa.Table) -> bool:
        """Return True if the vectors of a block are saved."""
        return self.saved is not None and table["block"][0].as_py() < len(self.saved.start_B)

    def saved_vectors(self, table: pa.Table) -> np.ndarray | None:
        """Return a block's saved vectors, (N, D); None without."""
        if self.saved is None or not self.is_saved(table):
            return None
        return self.saved.embeddings.vectors(int(self.saved.start_B[table["block"][0].as_py()]), len(table))


def tokenize_block(table: pa.Table, encoding: BlockEncoding, model: EncoderSpec) -> pa.Table:
    """Append the tokens of a block's texts and positives, which are null for a block that needs no encoding.

    Args:
        table: a block of `READ`.
        encoding: decides whether the block needs encoding.
        model: the model, whose tokenizer is used.

    Returns:
        The block with the columns `TOKENS` and `POSITIVE_TOKENS`.
    """
    rows, list_type = len(table), pa.large_list(pa.int32())
    tokens, positive_tokens = pa.nulls(rows, list_type), pa.nulls(rows, pa.large_list(list_type))
    if rows and not encoding.is_saved(table) and not encoding.store.has(encoding.name(table)):
        tokenize = task_tokenizer(model)
        queries, positives = table["query"].to_pylist(), table["positives"].combine_chunks()
        if queries[0] is None:
            tokens = tokens_column(*tokenize([], table["text"].to_pylist()))
        else:
            tokens = tokens_column(*tokenize(list(zip(queries, table["prompt"].to_pylist(), strict=True)), []))
        if positives.null_count == 0:
            flat = tokens_column(*tokenize([], positives.flatten().to_pylist()))
            positive_tokens = pa.LargeListArray.from_arrays(positives.offsets, flat)
    return table.append_column(TOKENS, tokens).append_column(POSITIVE_TOKENS, positive_tokens)


class EncodingActor:
    """Ray Data actor: encodes a block of `READ` into the store and returns its name.

    The model is loaded at the first block that is not in the store, and runs for one thread at a time.
    """

    def __init__(self, embedder: Embedder, store: Store, device: str, saved: SavedBlocks | None = None) -> None:
        """Remember the model; nothing is loaded yet.

        Args:
            embedder: the model.
            store: receives the blocks.
            device: torch device.
            saved: vectors of the passages, used instead of encoding them.
        """
        self._encoding, self._store = BlockEncoding(embedder, store, saved), store
        self._encode = TextEncoder(embedder, device)
        self._instructions: Instructions | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode one block; an empty one has no result. `seconds` do not contain the loading of the model."""
        if not len(table):
            return _RESULT.empty_table()
        tokens = [name for name in (TOKENS, POSITIVE_TOKENS) if name in table.column_names]
        read = table.drop_columns(tokens)
        name, start = self._encoding.name(read), time.monotonic()
        if not self._store.has(name):
            vectors_ND = self._encoding.saved_vectors(read)
            with self._encode.lock:
                if vectors_ND is None:
                    self._load()
                    start = time.monotonic()
                encoded = self.encoded(table.drop_columns(["block"]), vectors_ND)
            # another thread uses the model meanwhile
            self._store.write_table(name, encoded)
        seconds, reason = time.monotonic() - start, self._encode.padding_reason
        texts = table_digest(read.select(["text", "id"]))
        note = padding_message(reason) if reason else None
        result = [table["block"][0].as_py(), name, len(table), texts, seconds, note]
        return pa.table([[value] for value in result], schema=_RESULT)

    def encoded(self, table: pa.Table, vectors_ND: np.ndarray | None = None) -> pa.Table:
        """Return a block with its vectors: the given ones, or the model's."""
        tokens = {name: table[name] for name in (TOKENS, POSITIVE_TOKENS) if name in table.column_names}
        table = table.drop_columns(list(tokens))
        queries, prompts = table["query"].to_pylist(), table["prompt"].to_pylist()
        kind = "passage" if queries[0] is None else "query"
        if vectors_ND is not None:
            vectors_ND = finite_vectors(vectors_ND)
        elif tokens:
            vectors_ND = self._encode.encode_token_ids(tokens_of(tokens[TOKENS]), kind)
        elif kind == "query":
            instructions = self._load()
            texts = [instructions.query_text(q, p) for q, p in zip(queries, prompts, strict=True)]
            vectors_ND = self._encode(texts, kind)
        else:
            vectors_ND = self.passage_vectors(table["text"].to_pylist())
        positives = table["positives"].combine_chunks()
        flat = pa.array(vectors_ND.ravel(), pa.float32())
        table = table.drop_columns(["query", "prompt", "positives"])
        table = table.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1]))
        if positives.null_count == 0:
            if tokens:
                token_ids = tokens_of(tokens[POSITIVE_TOKENS].combine_chunks().flatten())
                positive_PD = self._encode.encode_token_ids(token_ids, "passage")
            else:
                positive_PD = self.passage_vectors(positives.flatten().to_pylist())
            row_P = np.repeat(np.arange(len(table)), positives.value_lengths().to_numpy())
            scores = np.einsum("pd,pd->p", vectors_ND[row_P], positive_PD)
            scores = pa.LargeListArray.from_arrays(positives.offsets, pa.array(scores, pa.float32()))
            table = table.append_column("pos_scores", scores)
        return table

    def passage_vectors(self, texts: list[str]) -> np.ndarray:
        """Return the vectors of passages, (N, D) float32."""
        instructions = self._load()
        return self._encode([instructions.passage_text(text) for text in texts], "passage")

    def _load(self) -> Instructions:
        """Load the model if it is not loaded, and return its instructions.

        They are applied here and not by the encoder, since a row may have a prompt of its own.
        """
        if self._instructions is None:
            self._instructions = self._encode.take_instructions()
        return self._instructions
