"""What a search keeps on disk, under names made of its content: a run that was killed finds it again.

A name is a hash of everything that the content follows from (model, options, text). So a name that is there is
finished and right, whoever wrote it; several runs may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from raybge.util.filesystem import filesystem


@dataclass(frozen=True)
class Piece:
    """One encoded block: its name in the store, its rows, and a hash of their texts and ids."""

    name: str
    rows: int
    texts: str = ""


class Store:
    """A folder, local or a URI. Files appear under their name when they are whole."""

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/")
        self._files, self._root = filesystem(self.folder)
        self.precious = False  # whether what is in it should outlive a run that fails

    def __reduce__(self) -> Any:
        return Store, (self.folder,)

    @property
    def local(self) -> bool:
        return isinstance(self._files, pafs.LocalFileSystem)

    def has(self, name: str) -> bool:
        return bool(self._files.get_file_info(self._place(name)).is_file)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Keep a table as one Arrow IPC file of one batch, which `table` maps into memory."""
        self._write(name, lambda out: _write_ipc(out, table))

    def table(self, name: str) -> pa.Table:
        """The table under a name, mapped into memory: its pages are read when they are looked at."""
        return pa.ipc.open_file(pa.memory_map(str(self._near(name)), "r")).read_all()

    def read(self, name: str) -> pa.Table:
        """The table under a name, read from where it lies; nothing of it is kept."""
        with self._files.open_input_file(self._place(name)) as stream:
            return pa.ipc.open_file(stream).read_all()

    def write_arrays(self, name: str, **arrays: np.ndarray) -> None:
        self._write(name, lambda out: np.savez(out, allow_pickle=False, **arrays))

    def arrays(self, name: str, *only: str) -> dict[str, np.ndarray]:
        """The arrays under a name, or some of them."""
        with self._files.open_input_file(self._place(name)) as stream, np.load(stream) as found:
            return {key: found[key] for key in only or found}

    def exists(self) -> bool:
        return bool(self._files.get_file_info(self._root).type == pafs.FileType.Directory)

    def remove(self) -> None:
        """Delete the folder and all that is in it."""
        if self.exists():
            self._files.delete_dir(self._root)

    def forget(self) -> None:
        """Delete this machine's copies of what lies at a URI."""
        shutil.rmtree(self._copies, ignore_errors=True)

    @property
    def _copies(self) -> Path:
        return Path(tempfile.gettempdir(), f"raybge-{os.getuid()}", digest(self.folder))

    def _place(self, name: str) -> str:
        return posixpath.join(self._root, name[:2], name)

    def _write(self, name: str, write: Callable[[Any], None]) -> None:
        place = self._place(name)
        aside = f"{place}.{uuid.uuid4().hex}.tmp"
        self._files.create_dir(posixpath.dirname(place), recursive=True)
        try:
            with self._files.open_output_stream(aside) as out:
                write(out)
            self._files.move(aside, place)
        except BaseException:
            if self._files.get_file_info(aside).is_file:
                self._files.delete_file(aside)
            raise

    def _near(self, name: str) -> str | Path:
        """Where the file lies on this machine; one of a URI is fetched first."""
        if self.local:
            return self._place(name)
        self._copies.mkdir(mode=0o700, parents=True, exist_ok=True)
        here = self._copies / name
        if not here.exists():
            aside = self._copies / f"{name}.{uuid.uuid4().hex}.tmp"
            pafs.copy_files(self._place(name), str(aside), source_filesystem=self._files)
            aside.rename(here)
        return here


def _write_ipc(out: Any, table: pa.Table) -> None:
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def digest(*what: object) -> str:
    """A name for what JSON can say, 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()


def table_digest(table: pa.Table, *what: object) -> str:
    """A name for the content of a table and what JSON can say."""
    sink = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16)
    sink.update(table.schema.serialize())
    table = table.take(pa.array(range(len(table)), pa.int64()))  # a slice would bring what lies around it
    for batch in table.combine_chunks().to_batches():
        sink.update(batch.serialize())
    return sink.hexdigest()


def files_digest(paths: Iterable[str | Path]) -> str:
    """A name for the content of files and what they are called in their folder."""
    sink = hashlib.blake2b(digest_size=16)
    for path in sorted(map(Path, paths)):
        with path.open("rb") as file:
            sink.update(f"{path.name}\0".encode())
            sink.update(hashlib.file_digest(file, "blake2b").digest())
    return sink.hexdigest()
