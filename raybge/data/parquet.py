"""Read Parquet files as JSON rows."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raybge.data.groups import RowError
from raybge.data.source_files import SourceFile, damage_error, open_stream
from raybge.util.errors import UserError, first_line


def row_group_sizes(file: SourceFile) -> list[int]:
    """Return the uncompressed bytes of each row group.

    Raises UserError if the file is damaged.
    """
    try:
        with open_stream(file) as stream:
            metadata = pq.read_metadata(stream)
    except (OSError, pa.ArrowException) as err:
        raise UserError(f"{file.name} is not a whole Parquet file ({err})") from err
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def parquet_rows(stream: pa.NativeFile, start: int, stop: int) -> Iterator[tuple[int, str | RowError]]:
    """Yield (row number, JSON text) of the rows in row groups [start, stop); a RowError in place of an invalid row."""
    number = 0
    try:
        table = pq.ParquetFile(stream)
        number = sum(table.metadata.row_group(group).num_rows for group in range(start))
        for batch in table.iter_batches(batch_size=1024, row_groups=list(range(start, stop))):
            try:
                rows: list[Any] = batch.to_pylist()
            except (ValueError, OverflowError):  # one bad value would hide the other rows
                rows = [_single_row(batch, at) for at in range(batch.num_rows)]
            for raw in rows:
                yield number, raw if isinstance(raw, RowError) else _json_text(raw)
                number += 1
    except (OSError, pa.ArrowException) as err:
        yield number, damage_error("Parquet", err)


def _single_row(batch: pa.RecordBatch, at: int) -> dict[str, Any] | RowError:
    try:
        row: dict[str, Any] = batch.slice(at, 1).to_pylist()[0]
        return row
    except UnicodeDecodeError as err:
        return RowError("", f"must be UTF-8 text, found byte 0x{err.object[err.start]:02x}")
    except (ValueError, OverflowError) as err:  # a date beyond Python's range
        return RowError("", f"must hold only values that JSON can represent ({first_line(err)})")


def _json_text(raw: dict[str, Any]) -> str | RowError:
    try:
        return json.dumps(raw, ensure_ascii=False, allow_nan=False, default=_to_json)
    except ValueError as err:
        return RowError("", f"must hold only values that JSON can represent ({err})")


def _to_json(value: object) -> str:
    """Convert Parquet types that JSON lacks: bytes to base64, dates and decimals to their text."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
