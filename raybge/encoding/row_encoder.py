"""Encoding of rows on Ray, block by block, into the store.

A block is read and encoded together. It is cut by the data alone, so that vectors are the same for any number of
actors, and a block that is in the store is not encoded again. The driver holds a name and a number per block.

Letters in array names: N rows of a block, D width of a vector.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.cli.console import Console
from raybge.cluster.remote_calls import unwrap_user_errors
from raybge.cluster.resources import Plan
from raybge.data.ray_datasets import batches_of, to_dataset
from raybge.data.survey import Survey
from raybge.encoding.fields import RowParser, value_kind
from raybge.search.actor_pool import TOKENS, map_on_actors, task_tokenizer, tokens_column, tokens_of
from raybge.search.columns import vectors_column, vectors_of
from raybge.search.embedder import Embedder, TextEncoder, device_of, padding_message
from raybge.search.pipeline import LOADING
from raybge.search.store import EncodedBlock, Store, table_digest
from raybge.util.digest import digest

# In the store: the written fields of each row as JSON; the column `vector` (D float32) is appended.
ROWS = pa.schema([("row", pa.large_string())])
_RESULT = pa.schema(
    [
        ("block", pa.int64()),
        ("name", pa.string()),
        ("rows", pa.int64()),
        ("kinds", pa.string()),
        ("low", pa.list_(pa.float32())),
        ("high", pa.list_(pa.float32())),
        ("seconds", pa.float64()),  # without the loading of the model
        ("note", pa.string()),  # a line for the user
    ]
)


@dataclass(frozen=True)
class RowEncoding:
    """Encoding of a row: model, instruction and fields.

    Args:
        embedder: the model.
        kind: "query" or "passage": whose instruction and length apply.
        parser: text and fields of a row.
    """

    embedder: Embedder
    kind: str
    parser: RowParser

    @property
    def identity(self) -> str:
        """Digest of everything that a stored block depends on besides its rows."""
        return digest(self.embedder.identity, self.kind, self.parser.text, self.parser.fields)

    def name(self, table: pa.Table) -> str:
        """Return the name of a block of rows in the store."""
        return table_digest(table.select(["json"]), self.identity)


@dataclass
class EncodedRows:
    """All encoded rows.

    Args:
        blocks: blocks in the store, in order.
        kinds: kinds of the values of each field.
        ranges_2D: minimum and maximum of each dimension, if requested.
    """

    blocks: list[EncodedBlock] = field(default_factory=list)
    kinds: dict[str, set[str]] = field(default_factory=dict)
    ranges_2D: np.ndarray | None = None

    def add(self, result: dict[str, Any]) -> None:
        """Add the kinds and ranges of a block, a row of `_RESULT`."""
        for name, kinds in json.loads(result["kinds"]).items():
            self.kinds.setdefault(name, set()).update(kinds)
        if result["low"] is not None:
            block_2D = np.array([result["low"], result["high"]], np.float32)
            known_2D = block_2D if self.ranges_2D is None else self.ranges_2D
            self.ranges_2D = np.stack([np.minimum(known_2D[0], block_2D[0]), np.maximum(known_2D[1], block_2D[1])])


def encode_rows(
    survey: Survey, encoding: RowEncoding, store: Store, plan: Plan, with_ranges: bool, console: Console
) -> EncodedRows:
    """Encode the usable rows of a survey on `plan.workers` actors, into the store.

    Args:
        survey: blocks of the rows.
        encoding: model and fields.
        store: receives the blocks.
        plan: actors and their resources.
        with_ranges: compute the minimum and maximum of each dimension.
        console: shows the progress.

    Returns:
        The encoded rows.
    """
    dataset = to_dataset(survey, encoding.parser)
    if encoding.embedder.tokenized:
        dataset = dataset.map_batches(tokenize_rows, fn_args=(encoding, store), batch_size=None, batch_format="pyarrow")
    arguments = encoding, store, device_of(plan), with_ranges
    encoded = map_on_actors(dataset, RowEncodingActor, arguments, plan, len(survey.blocks))
    notes: set[str] = set()
    blocks: dict[int, EncodedBlock] = {}
    rows = EncodedRows()
    progress = console.bar("encode", survey.total_rows, "text", start_up=LOADING)
    with unwrap_user_errors(), progress as bar, batches_of(encoded) as batches:
        for batch in batches:
            for result in batch.to_pylist():
                blocks[result["block"]] = EncodedBlock(result["name"], result["rows"])
                rows.add(result)
                bar.update(result["rows"], result["seconds"])
                notes |= {result["note"]} - {None}
    for note in sorted(notes):
        console.info(note)
    rows.blocks = [blocks[number] for number in sorted(blocks)]
    count = sum(block.rows for block in rows.blocks)
    if count != survey.total_rows:
        raise RuntimeError(f"encoded {count} rows of {survey.total_rows}")
    return rows


def tokenize_rows(table: pa.Table, encoding: RowEncoding, store: Store) -> pa.Table:
    """Append the column `TOKENS` to a block of rows; null for a block that is in the store.

    Args:
        table: a block of rows.
        encoding: model and fields.
        store: receives the blocks.

    Returns:
        The block with the column.
    """
    tokens = pa.nulls(len(table), pa.large_list(pa.int32()))
    if len(table) and encoding.embedder.tokenized and not store.has(encoding.name(table)):
        texts = [json.loads(text)[encoding.parser.text] for text in table["json"].to_pylist()]
        queries, passages = ([(text, None) for text in texts], []) if encoding.kind == "query" else ([], texts)
        tokens = tokens_column(*task_tokenizer(encoding.embedder.tokenized)(queries, passages))
    return table.append_column(TOKENS, tokens)


class RowEncodingActor:
    """Ray Data actor: encodes a block of rows into the store and returns its name."""

    def __init__(self, encoding: RowEncoding, store: Store, device: str, with_ranges: bool) -> None:
        """Remember the model; it is loaded at the first block that is not in the store.

        Args:
            encoding: model and fields.
            store: receives the blocks.
            device: torch device.
            with_ranges: return the minimum and maximum of each dimension.
        """
        self._encoding, self._store, self._with_ranges = encoding, store, with_ranges
        self._encode = TextEncoder(encoding.embedder, device)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode one block; an empty one has no result."""
        if not len(table):
            return _RESULT.empty_table()
        rows = [json.loads(text) for text in table["json"].to_pylist()]
        parser = self._encoding.parser
        name, kind = self._encoding.name(table), self._encoding.kind
        start = time.monotonic()
        if not self._store.has(name):
            with self._encode.lock:
                self._encode.load()
                start = time.monotonic()
                if TOKENS in table.column_names:
                    vectors_ND = self._encode.encode_token_ids(tokens_of(table[TOKENS]), kind)
                else:
                    vectors_ND = self._encode([row[parser.text] for row in rows], kind)
            fields = [json.dumps({key: row[key] for key in parser.fields if key in row}) for row in rows]
            block = pa.table([pa.array(fields, pa.large_string())], schema=ROWS)
            self._store.write_table(name, block.append_column("vector", vectors_column(vectors_ND)))
        seconds = time.monotonic() - start
        low_D = high_D = None
        if self._with_ranges:
            vectors_ND = vectors_of(self._store.read(name))
            low_D, high_D = vectors_ND.min(0), vectors_ND.max(0)
        kinds = {key: sorted({value_kind(row.get(key)) for row in rows}) for key in parser.fields}
        reason = self._encode.padding_reason
        note = padding_message(reason) if reason else None
        result = [table["block"][0].as_py(), name, len(table), json.dumps(kinds), low_D, high_D, seconds, note]
        return pa.table([[value] for value in result], schema=_RESULT)
