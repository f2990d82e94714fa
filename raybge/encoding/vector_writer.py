"""Vectors written in the input's order: one Parquet file, a folder of them, or one .npy; a block in memory at a time.

What is written follows from the blocks in the store, and so from the data alone.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raybge.cluster.remote_calls import in_order
from raybge.model.quantization import Precision, packed_width, quantize_embeddings
from raybge.search.store import Piece, Store
from raybge.search.vectors import columns_of, vectors_column, vectors_of
from raybge.util import atomic_write as output
from raybge.util.errors import UserError
from raybge.util.filesystem import filesystem

FLAG = "--output_file"
GROUP_BYTES = 64 << 20  # of a Parquet row group, about
PART_ROWS = 250_000  # of a file in a folder, about
FINISHED = "_SUCCESS"  # the last file of a folder, empty
OTHERS = (".jsonl", ".json", ".gz", ".zst", ".csv", ".npz", ".txt", ".arrow")  # endings of files that are not written


@dataclass(frozen=True)
class Layout:
    """What is written: fields of the rows, then vectors of so many numbers at a precision, with its ranges (2, D)."""

    fields: pa.Schema
    width: int
    precision: Precision
    ranges_2D: np.ndarray | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a vector's numbers as they are written."""
        return np.dtype({"binary": "int8", "ubinary": "uint8"}.get(self.precision, self.precision))

    @property
    def packed(self) -> int:
        """Numbers in a vector as it is written."""
        return packed_width(self.width, self.precision)

    @property
    def schema(self) -> pa.Schema:
        vectors = pa.list_(pa.from_numpy_dtype(self.dtype), self.packed)
        return pa.schema([*self.fields, pa.field("embedding", vectors)])

    def vectors(self, block: pa.Table) -> np.ndarray:
        return quantize_embeddings(vectors_of(block), self.precision, self.ranges_2D)

    def table(self, block: pa.Table) -> pa.Table:
        rows = [json.loads(text) for text in block["row"].to_pylist()]
        columns = [*columns_of(rows, self.fields), vectors_column(self.vectors(block))]
        return pa.Table.from_arrays(columns, schema=self.schema)


def shape_of(path: str) -> str:
    """ "parquet", "npy" or "folder", by the name's ending. UserError for the ending of another kind of file."""
    ending = os.path.splitext(path.partition("?")[0])[1].lower()
    if ending in OTHERS:
        raise UserError(f"{FLAG} {path}: vectors are written as .parquet, as .npy, or into a folder of Parquet files")
    return ending[1:] if ending in (".parquet", ".npy") else "folder"


def is_finished(path: str) -> bool:
    """Whether the whole output is there. UserError where something else is."""
    if shape_of(path) != "folder":
        return output.exists(path, FLAG)
    store, place = _opened(path)
    if store.get_file_info(place).is_file:
        raise UserError(f"{FLAG}: {path} is a file; a folder of Parquet files is to be written there")
    if store.get_file_info(posixpath.join(place, FINISHED)).is_file:
        return True
    there = store.get_file_info(pafs.FileSelector(place, allow_not_found=True))
    if there and isinstance(store, pafs.LocalFileSystem):  # elsewhere it may be a run's that was killed
        raise UserError(f"{FLAG}: the folder {path} holds files that are not this command's; give it another name")
    return False


def write(path: str, pieces: Sequence[Piece], layout: Layout, store: Store, bar: Any) -> None:
    """Write all blocks. What is there under the name is replaced."""
    shape = shape_of(path)
    if shape == "folder":
        _write_folder(path, pieces, layout, store, bar)
        return
    with output.written_aside(path, FLAG) as out:
        (_write_npy if shape == "npy" else _write_parquet)(out, _counted(pieces, store, bar), layout, pieces)


def _counted(pieces: Iterable[Piece], store: Store, bar: Any = None) -> Iterator[pa.Table]:
    """The blocks, one after the other."""
    for piece in pieces:
        yield store.read(piece.name)
        if bar is not None:
            bar.update(piece.rows)


def _write_npy(out: Any, blocks: Iterable[pa.Table], layout: Layout, pieces: Sequence[Piece]) -> None:
    shape = sum(piece.rows for piece in pieces), layout.packed
    head = {"descr": np.lib.format.dtype_to_descr(layout.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, head)
    for block in blocks:
        out.write(np.ascontiguousarray(layout.vectors(block)).tobytes())


def _write_parquet(out: Any, blocks: Iterable[pa.Table], layout: Layout, pieces: Sequence[Piece]) -> None:
    held: list[pa.Table] = []

    def flush() -> None:
        if held:
            table = pa.concat_tables(held)
            writer.write_table(table, row_group_size=len(table))
            held.clear()

    # numbers of a vector seldom repeat: a dictionary of them would only cost
    with pq.ParquetWriter(out, layout.schema, compression="zstd", use_dictionary=False) as writer:
        for block in blocks:
            held.append(layout.table(block))
            if sum(table.nbytes for table in held) >= GROUP_BYTES:
                flush()
        flush()


def _write_folder(path: str, pieces: Sequence[Piece], layout: Layout, store: Store, bar: Any) -> None:
    """Parts side by side, as Ray tasks."""
    import ray

    write_part = ray.remote(_write_part).remote
    with output.folder_written_aside(path, FLAG, FINISHED) as place:
        calls = (
            (write_part, path, posixpath.join(place, f"part-{number:05d}.parquet"), part, layout, store)
            for number, part in enumerate(parts_of(pieces))
        )
        for rows in in_order(calls):
            bar.update(rows)


def parts_of(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Blocks in runs of about `PART_ROWS` rows."""
    parts: list[list[Piece]] = []
    rows = PART_ROWS
    for piece in pieces:
        if rows >= PART_ROWS:
            parts.append([])
            rows = 0
        parts[-1].append(piece)
        rows += piece.rows
    return parts


def _write_part(path: str, place: str, pieces: Sequence[Piece], layout: Layout, store: Store) -> int:
    """Rows written to `place` on the file system of `path`. A task that Ray starts again begins anew."""
    files, _ = filesystem(path)
    with files.open_output_stream(place) as out:
        _write_parquet(out, _counted(pieces, store), layout, pieces)
    return sum(piece.rows for piece in pieces)


def _opened(path: str) -> tuple[pafs.FileSystem, str]:
    try:
        store, place = filesystem(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{FLAG}: {path} cannot be written ({error})") from error
    return store, place.rstrip("/")
