"""Tables of tokens that several runs of a search read: whichever needs one first makes it."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa


@dataclass(frozen=True)
class TokenCache:
    """A folder of Arrow streams. What they are made from must be the same for all who use it."""

    folder: str

    def tables(self, name: str, make: Callable[[], Iterator[pa.Table]]) -> Iterator[pa.Table]:
        """The tables of `make()`, which are of one schema; read from the file of that name once there is one.

        The file appears when the last table was taken; until then all of them are in memory.
        """
        path = Path(self.folder, f"{name}.arrow")
        if path.exists():
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch])
            return
        made = []
        for table in make():
            made.append(table)
            yield table
        if made:
            with contextlib.suppress(OSError):  # a full disk costs the file, not the run
                _write(path, made)


def _write(path: Path, tables: Sequence[pa.Table]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_stream(file, tables[0].schema) as stream:
            for table in tables:
                stream.write_table(table)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
