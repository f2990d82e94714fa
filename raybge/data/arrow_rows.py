"""Rows of Arrow record batches, which Parquet and Arrow files hold, as JSON text."""

from __future__ import annotations

import base64
import decimal
import json
import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from raybge.data.groups import RowError
from raybge.data.source_files import damage_error
from raybge.util.errors import first_line

MAGIC = b"ARROW1"  # of a file with an index of its record batches; a stream, as `datasets` writes it, has none


def arrow_rows(stream: pa.NativeFile) -> Iterator[tuple[int, str | RowError]]:
    """Yield (row number, JSON text) of an Arrow file or stream; a RowError in place of an invalid row."""
    number = 0
    try:
        indexed = stream.read(len(MAGIC)) == MAGIC
        stream.seek(0)
        if indexed:
            file = pa.ipc.open_file(stream)
            batches: Any = (file.get_batch(at) for at in range(file.num_record_batches))
        else:
            batches = pa.ipc.open_stream(stream)
        for batch in batches:
            for text in json_rows(batch):
                yield number, text
                number += 1
    except (OSError, pa.ArrowException) as err:
        yield number, damage_error("Arrow", err)


def json_rows(batch: pa.RecordBatch) -> Iterator[str | RowError]:
    """Yield each row of a batch as JSON text.

    Text may be of any Arrow type for text or bytes, and lists of any type for lists. Bytes are UTF-8 text. A value that
    JSON lacks becomes one that no text, number or list is mistaken for, so that it is refused where it is read and
    nowhere else: null for NaN and infinite numbers, an object for bytes that are not UTF-8 and for a date beyond
    Python's range. Decimals become numbers; dates, times and the like become text.
    """
    names = batch.schema.names
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        yield from [RowError(double, "must be the name of one column, found two") for _ in range(batch.num_rows)]
        return
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError):  # one bad value hides the whole batch
        columns = [(name, batch.column(name)) for name in names]
        rows = [{name: _value(column[at]) for name, column in columns} for at in range(batch.num_rows)]
    for row in rows:
        try:
            yield json.dumps(row, ensure_ascii=False, allow_nan=False, default=_to_json)
        except ValueError:
            yield json.dumps(_finite(row), ensure_ascii=False)


def _value(scalar: pa.Scalar) -> Any:
    """Return a value for Python, or for one that Python lacks an object that describes it."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError as err:
        return _bytes_object(err.object)
    except (ValueError, OverflowError) as err:
        return {"unreadable": first_line(err)}


def _to_json(value: Any) -> Any:
    """Convert a value of a type that JSON lacks."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return _bytes_object(value)
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value.item() if hasattr(value, "item") else str(value)  # numpy's float16


def _bytes_object(value: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(value).decode()}


def _finite(value: Any) -> Any:
    """Return the value with null in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _finite(_to_json(value))
