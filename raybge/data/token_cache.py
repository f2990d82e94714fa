"""Files of token tables that several trials of a search share: the first that needs a table creates it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from raybge.util.atomic_write import atomic_stream
from raybge.util.filesystem import filesystem


@dataclass(frozen=True)
class TokenCache:
    """Folder of Arrow streams. All users of a folder must tokenize the same data with the same settings.

    Args:
        folder: the local folder.
    """

    folder: str

    def tables(self, name: str, make: Callable[[], Iterator[pa.Table]]) -> Iterator[pa.Table]:
        """Yield the tables of the file `name`, or create them and write the file.

        The file is written after the last table was consumed; until then all tables are in memory.

        Args:
            name: name of the file, without ending.
            make: creates the tables, which have one schema.

        Yields:
            The tables in order.
        """
        path = Path(self.folder, f"{name}.arrow")
        if path.exists():
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch])
            return
        tables = []
        for table in make():
            tables.append(table)
            yield table
        if tables:
            with contextlib.suppress(OSError):  # a full disk costs the file, not the run
                _write(path, tables)


def _write(path: Path, tables: Sequence[pa.Table]) -> None:
    with atomic_stream(*filesystem(str(path))) as file, pa.ipc.new_stream(file, tables[0].schema) as stream:
        for table in tables:
            stream.write_table(table)
