"""Output of vectors in the order of the input: one Parquet file, a folder of them, or one .npy.

One block is in memory at a time. The output follows from the blocks in the store, and so from the data alone.
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

from raybge.cluster.remote_calls import results_in_order
from raybge.encoding.fields import field_columns
from raybge.model.quantization import Precision, packed_width, quantize_embeddings
from raybge.search.columns import vectors_column, vectors_of
from raybge.search.store import EncodedBlock, Store
from raybge.util import atomic_write
from raybge.util.errors import UserError, first_line
from raybge.util.filesystem import filesystem

FLAG = "--output_file"
ROW_GROUP_BYTES = 64 << 20  # approximate size of a Parquet row group
PART_ROWS = 250_000  # approximate rows of a file in a folder
SUCCESS_FILE = "_SUCCESS"  # last file of a complete folder, empty
OTHER_ENDINGS = (".jsonl", ".json", ".gz", ".zst", ".csv", ".npz", ".txt", ".arrow")  # unsupported file formats


@dataclass(frozen=True)
class Layout:
    """Columns of the output.

    Args:
        fields: fields of the rows.
        width: width of the vectors before packing.
        precision: precision of the written vectors.
        ranges_2D: quantization ranges, minimum and maximum of each dimension.
    """

    fields: pa.Schema
    width: int
    precision: Precision
    ranges_2D: np.ndarray | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the written numbers."""
        return np.dtype({"binary": "int8", "ubinary": "uint8"}.get(self.precision, self.precision))

    @property
    def packed_width(self) -> int:
        """Numbers per written vector: binary precisions pack 8 dimensions into one."""
        return packed_width(self.width, self.precision)

    @property
    def schema(self) -> pa.Schema:
        """Schema of a Parquet output."""
        vectors = pa.list_(pa.from_numpy_dtype(self.dtype), self.packed_width)
        return pa.schema([*self.fields, pa.field("embedding", vectors)])

    def vectors(self, block: pa.Table) -> np.ndarray:
        """Return the quantized vectors of a block, (N, packed width)."""
        return quantize_embeddings(vectors_of(block), self.precision, self.ranges_2D)

    def table(self, block: pa.Table) -> pa.Table:
        """Return a block as rows of the output."""
        rows = [json.loads(text) for text in block["row"].to_pylist()]
        columns = [*field_columns(rows, self.fields), vectors_column(self.vectors(block))]
        return pa.Table.from_arrays(columns, schema=self.schema)


def output_format(path: str) -> str:
    """Return "parquet", "npy" or "folder", by the ending of the path.

    Args:
        path: value of `--output_file`.

    Returns:
        The format.

    Raises:
        UserError: the ending of another file format.
    """
    ending = os.path.splitext(path.partition("?")[0])[1].lower()
    if ending in OTHER_ENDINGS:
        raise UserError(f"{FLAG} {path}: vectors are written as .parquet, as .npy, or into a folder of Parquet files")
    return ending[1:] if ending in (".parquet", ".npy") else "folder"


def is_finished(path: str) -> bool:
    """Return True if the complete output exists.

    Args:
        path: value of `--output_file`.

    Returns:
        True if nothing is left to do.

    Raises:
        UserError: something else exists under this name.
    """
    if output_format(path) != "folder":
        return atomic_write.exists(path, FLAG)
    try:
        return _is_finished_folder(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{FLAG}: {path} cannot be written ({first_line(error)})") from error


def _is_finished_folder(path: str) -> bool:
    files, place = filesystem(path)
    place = place.rstrip("/")
    if files.get_file_info(place).is_file:
        raise UserError(f"{FLAG}: {path} is a file, but the output is a folder of Parquet files; choose another name")
    if files.get_file_info(posixpath.join(place, SUCCESS_FILE)).is_file:
        return True
    content = files.get_file_info(pafs.FileSelector(place, allow_not_found=True))
    if content and isinstance(files, pafs.LocalFileSystem):  # at a URI it may be left from an interrupted run
        raise UserError(f"{FLAG}: the folder {path} holds files that this command did not write; choose another name")
    return False


def write(path: str, blocks: Sequence[EncodedBlock], layout: Layout, store: Store, bar: Any) -> None:
    """Write all blocks; an existing output is replaced.

    Args:
        path: output file or folder.
        blocks: encoded rows, in order.
        layout: columns of the output.
        store: holds the blocks.
        bar: progress bar, counts rows.
    """
    kind = output_format(path)
    if kind == "folder":
        _write_folder(path, blocks, layout, store, bar)
        return
    with atomic_write.open_atomic(path, FLAG) as out:
        (_write_npy if kind == "npy" else _write_parquet)(out, _tables(blocks, store, bar), layout, blocks)


def _tables(blocks: Iterable[EncodedBlock], store: Store, bar: Any = None) -> Iterator[pa.Table]:
    """Yield the blocks, one after the other."""
    for block in blocks:
        yield store.read(block.name)
        if bar is not None:
            bar.update(block.rows)


def _write_npy(out: Any, tables: Iterable[pa.Table], layout: Layout, blocks: Sequence[EncodedBlock]) -> None:
    shape = sum(block.rows for block in blocks), layout.packed_width
    header = {"descr": np.lib.format.dtype_to_descr(layout.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
    for table in tables:
        out.write(np.ascontiguousarray(layout.vectors(table)).tobytes())


def _write_parquet(out: Any, tables: Iterable[pa.Table], layout: Layout, blocks: Sequence[EncodedBlock]) -> None:
    pending: list[pa.Table] = []

    def flush() -> None:
        if pending:
            table = pa.concat_tables(pending)
            writer.write_table(table, row_group_size=len(table))
            pending.clear()

    # numbers of a vector seldom repeat: a dictionary would only cost space
    with pq.ParquetWriter(out, layout.schema, compression="zstd", use_dictionary=False) as writer:
        for table in tables:
            pending.append(layout.table(table))
            if sum(each.nbytes for each in pending) >= ROW_GROUP_BYTES:
                flush()
        flush()


def _write_folder(path: str, blocks: Sequence[EncodedBlock], layout: Layout, store: Store, bar: Any) -> None:
    """Write the parts of a folder in parallel Ray tasks."""
    import ray

    write_part = ray.remote(_write_part).remote
    with atomic_write.atomic_folder(path, FLAG, SUCCESS_FILE) as folder:
        calls = (
            (write_part, path, posixpath.join(folder, f"part-{number:05d}.parquet"), part, layout, store)
            for number, part in enumerate(split_parts(blocks))
        )
        for rows in results_in_order(calls):
            bar.update(rows)


def split_parts(blocks: Sequence[EncodedBlock]) -> list[list[EncodedBlock]]:
    """Split blocks into consecutive parts of about `PART_ROWS` rows."""
    parts: list[list[EncodedBlock]] = []
    rows = PART_ROWS
    for block in blocks:
        if rows >= PART_ROWS:
            parts.append([])
            rows = 0
        parts[-1].append(block)
        rows += block.rows
    return parts


def _write_part(path: str, place: str, blocks: Sequence[EncodedBlock], layout: Layout, store: Store) -> int:
    """Write one part to `place` on the file system of `path`; a task that Ray restarts begins again."""
    files, _ = filesystem(path)
    with files.open_output_stream(place) as out:
        _write_parquet(out, _tables(blocks, store), layout, blocks)
    return sum(block.rows for block in blocks)
