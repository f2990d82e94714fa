"""Rows of files encoded on Ray, block by block, into the store: what `raybge.encode` writes from.

A block is what is read and encoded together. It is cut by the data alone, so vectors are the same for any number of
actors, and one that the store holds is not encoded again. The driver holds a name and a number of each.

Letters in array names: N rows of a block, D width of a vector.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.cli.console import Console
from raybge.cluster.remote_calls import unwrapped
from raybge.cluster.resources import Plan
from raybge.data.groups import RowError, parse_field
from raybge.data.ray_datasets import to_dataset
from raybge.data.survey import Survey
from raybge.model.quantization import quantize_embeddings
from raybge.search.pipeline import Embedder, finite
from raybge.search.store import Piece, Store, digest, table_digest
from raybge.util.errors import UserError

IDS = ("id", "_id")  # fields that are kept where the rows have them
# In the store: the kept fields of each row as JSON; `vector` follows, D float32.
KEPT = pa.schema([("row", pa.large_string())])


@dataclass(frozen=True)
class RowParser:
    """What a row must have: a text, and the fields that were asked for by name."""

    text: str
    asked: tuple[str, ...] | None

    @property
    def kept(self) -> tuple[str, ...]:
        """Fields that are written, in their order; those of `IDS` where there are any."""
        return (*(name for name in IDS if name != self.text), self.text) if self.asked is None else self.asked

    def __call__(self, raw: dict[str, Any]) -> str:
        return parse_field(raw, self.text, self.asked or ())


@dataclass(frozen=True)
class Encoding:
    """How a row becomes a vector: `kind` "query" or "passage" has its instruction and length."""

    embedder: Embedder
    kind: str
    parser: RowParser

    @property
    def identity(self) -> str:
        return digest(self.embedder.identity, self.kind, self.parser.text, self.parser.kept)


@dataclass
class Encoded:
    """All that was encoded: the blocks in the store, in order; what kinds of values each kept field has; and, where it
    was asked for, the least and the greatest value of each dimension, (2, D).
    """

    pieces: list[Piece] = field(default_factory=list)
    kinds: dict[str, set[str]] = field(default_factory=dict)
    ranges_2D: np.ndarray | None = None

    def add(self, said: dict[str, Any]) -> None:
        for name, kinds in json.loads(said["kinds"]).items():
            self.kinds.setdefault(name, set()).update(kinds)
        if said["low"] is not None:
            found_2D = np.array([said["low"], said["high"]], np.float32)
            known_2D = found_2D if self.ranges_2D is None else self.ranges_2D
            self.ranges_2D = np.stack([np.minimum(known_2D[0], found_2D[0]), np.maximum(known_2D[1], found_2D[1])])


def encode_rows(
    survey: Survey, encoding: Encoding, store: Store, plan: Plan, ranges: bool, console: Console
) -> Encoded:
    """Encode the usable rows of the survey on `plan.workers` actors, into the store.

    `ranges`: look for the least and the greatest values.
    """
    import ray

    encoded = to_dataset(survey, encoding.parser).map_batches(
        _EncodeRows,
        fn_constructor_args=(encoding, store, device_of(plan), ranges),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(plan.workers, len(survey.blocks))),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus,
    )
    found: dict[int, Piece] = {}
    result = Encoded()
    with unwrapped(), console.bar("encode", survey.total_rows, "texts") as bar:
        for said in encoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for done in said.to_pylist():
                found[done["block"]] = Piece(done["name"], done["rows"])
                result.add(done)
                bar.update(done["rows"])
    result.pieces = [found[number] for number in sorted(found)]
    if sum(piece.rows for piece in result.pieces) != survey.total_rows:
        raise RuntimeError(f"encoded {sum(piece.rows for piece in result.pieces)} rows of {survey.total_rows}")
    return result


def device_of(plan: Plan) -> str:
    """The device of an actor, which sees its own GPU alone."""
    return "cuda:0" if plan.gpus else "cpu"


class _EncodeRows:
    """The Ray Data actor: takes a block as it is read, says where it lies encoded."""

    SAID = pa.schema(
        [
            ("block", pa.int64()),
            ("name", pa.string()),
            ("rows", pa.int64()),
            ("kinds", pa.string()),
            ("low", pa.list_(pa.float32())),
            ("high", pa.list_(pa.float32())),
        ]
    )

    def __init__(self, encoding: Encoding, store: Store, device: str, ranges: bool) -> None:
        self._encoding, self._store, self._ranges = encoding, store, ranges
        self._encode = Texts(encoding.embedder, device)

    def __call__(self, table: pa.Table) -> pa.Table:
        if not len(table):
            return self.SAID.empty_table()
        rows = [json.loads(text) for text in table["json"].to_pylist()]
        parser = self._encoding.parser
        name = table_digest(table.select(["json"]), self._encoding.identity)
        if not self._store.has(name):
            vectors_ND = self._encode([row[parser.text] for row in rows], self._encoding.kind)
            kept = [json.dumps({key: row[key] for key in parser.kept if key in row}) for row in rows]
            made = pa.table([pa.array(kept, pa.large_string())], schema=KEPT)
            self._store.write_table(name, made.append_column("vector", vectors_column(vectors_ND)))
        low_D = high_D = None
        if self._ranges:
            vectors_ND = vectors_of(self._store.read(name))
            low_D, high_D = vectors_ND.min(0), vectors_ND.max(0)
        kinds = {key: sorted({kind_of(row.get(key)) for row in rows}) for key in parser.kept}
        said = [table["block"][0].as_py(), name, len(table), json.dumps(kinds), low_D, high_D]
        return pa.table([[each] for each in said], schema=self.SAID)


class Texts:
    """Vectors of texts in an actor: the model is loaded for the first."""

    def __init__(self, embedder: Embedder, device: str) -> None:
        self._embedder, self._device = embedder, device
        self._encoder: Any = None

    def __call__(self, texts: list[str], kind: str | None) -> np.ndarray:
        """(N, D) fp32; of `kind` "query" or "passage" with its instruction and length."""
        if self._encoder is None:
            self._encoder = self._embedder.make(self._device)
        method = {"query": "encode_queries", "passage": "encode_corpus", None: "encode"}[kind]
        return finite(getattr(self._encoder, method)(texts, convert_to_numpy=True))


class EncodeColumn:
    """The actor of a person's own Ray Dataset: adds a column `embedding`."""

    def __init__(
        self,
        embedder: Embedder,
        kind: str,
        text: str,
        precision: Any,
        ranges_2D: np.ndarray | None,
        device: str = "cpu",
    ) -> None:
        self._encode = Texts(embedder, device)
        self._kind, self._text, self._precision, self._ranges_2D = kind, text, precision, ranges_2D

    def __call__(self, table: pa.Table) -> pa.Table:
        if self._text not in table.column_names:
            raise UserError(
                f"text_field: the Dataset has no column {self._text!r}, only {', '.join(table.column_names)}"
            )
        texts = table[self._text].to_pylist()
        try:
            for text in texts:
                parse_field({self._text: text}, self._text)
        except RowError as error:
            raise UserError(f'text_field: "{error.field}" {error.expected}') from None
        vectors_ND = quantize_embeddings(self._encode(texts, self._kind), self._precision, self._ranges_2D)
        return table.append_column("embedding", vectors_column(vectors_ND))


# --- columns ----------------------------------------------------------------------------------------------


def vectors_column(vectors_ND: np.ndarray) -> pa.Array:
    """Vectors as fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors_ND).ravel()), vectors_ND.shape[1])


def vectors_of(table: pa.Table) -> np.ndarray:
    """(N, D) of the column `vector` of a block."""
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(table), column.type.list_size)


def kind_of(value: Any) -> str:
    """What a column that holds this JSON value may be."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "json"
    return {str: "text", float: "float", type(None): "null"}.get(type(value), "json")


def column_type(kinds: Iterable[str]) -> pa.DataType | None:
    """The type of a column of values of these kinds: text where they differ; None where all are null."""
    found = {*kinds} - {"null"}
    if not found:
        return None
    if found <= {"int", "float"}:
        return pa.float64() if "float" in found else pa.int64()
    return pa.bool_() if found == {"bool"} else pa.string()


def columns_of(rows: list[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Array]:
    """The fields of rows as columns of the schema; what is no text in a column of text is written as JSON."""
    for column in schema:
        values = [row.get(column.name) for row in rows]
        if column.type == pa.string():
            values = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        yield pa.array(values, column.type)
