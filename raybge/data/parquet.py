"""Read Parquet files as JSON rows."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from raybge.data.arrow_rows import json_rows
from raybge.data.groups import RowError
from raybge.data.source_files import SourceFile, damage_error, open_stream
from raybge.util.errors import UserError


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
            for text in json_rows(batch):
                yield number, text
                number += 1
    except (OSError, pa.ArrowException) as err:
        yield number, damage_error("Parquet", err)
