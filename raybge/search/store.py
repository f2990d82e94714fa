"""Content-addressed store of intermediate results on disk, from which an interrupted run continues.

A name is a digest of everything that the content depends on (model, options, text). An existing name is therefore
complete and correct, whichever run wrote it; several runs may share a folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from raybge.util.atomic_write import atomic_stream
from raybge.util.digest import digest
from raybge.util.filesystem import append_to_path, filesystem

if TYPE_CHECKING:
    from raybge.cli.console import Console
    from raybge.search.spec import OutputSpec


@dataclass(frozen=True)
class EncodedBlock:
    """One encoded block: its name in the store, its number of rows, and a digest of their texts and ids."""

    name: str
    rows: int
    texts: str = ""


class Store:
    """A folder, local or a URI. Files appear under their name only when they are complete."""

    def __init__(self, folder: str) -> None:
        """Open the folder, which need not exist.

        Args:
            folder: path or URI; it is created by the first write.
        """
        self.folder = folder.rstrip("/")
        self._files, self._root = filesystem(self.folder)
        self.keep_on_failure = False  # keep the folder if the run that fills it fails

    def __reduce__(self) -> Any:
        return Store, (self.folder,)

    @property
    def local(self) -> bool:
        """True for a folder of the local file system."""
        return isinstance(self._files, pafs.LocalFileSystem)

    def has(self, name: str) -> bool:
        """Return True if there is a file of this name."""
        return bool(self._files.get_file_info(self._path(name)).is_file)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a table as one Arrow IPC file of one batch, which `table` maps into memory."""
        self._write(name, lambda out: _write_ipc(out, table))

    def table(self, name: str) -> pa.Table:
        """Return a memory-mapped table: its pages are read when they are accessed."""
        return pa.ipc.open_file(pa.memory_map(str(self._local_path(name)), "r")).read_all()

    def read(self, name: str) -> pa.Table:
        """Read a table into memory, from the URI if the store is at one; no local copy is kept."""
        with self._files.open_input_file(self._path(name)) as stream:
            return pa.ipc.open_file(stream).read_all()

    def write_arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Write arrays as one .npz file."""
        self._write(name, lambda out: np.savez(out, allow_pickle=False, **arrays))

    def arrays(self, name: str, *only: str) -> dict[str, np.ndarray]:
        """Read the arrays of a name, or some of them, by their keys."""
        with self._files.open_input_file(self._path(name)) as stream:
            # an archive is read in many small pieces, each of which would be a request to an object store
            source = stream if self.local else io.BytesIO(stream.read())
            with np.load(source) as archive:
                return {key: archive[key] for key in only or archive}

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON value."""
        self._write(name, lambda out: out.write(json.dumps(value).encode()))

    def json(self, name: str) -> Any:
        """Read the JSON value of a name; ValueError if the file has none."""
        with self._files.open_input_file(self._path(name)) as stream:
            return json.loads(stream.read())

    def exists(self) -> bool:
        """Return True if the folder exists."""
        return bool(self._files.get_file_info(self._root).type == pafs.FileType.Directory)

    def remove(self) -> None:
        """Delete the folder with its content."""
        if self.exists():
            self._files.delete_dir(self._root)

    def remove_local_copies(self) -> None:
        """Delete this machine's copies of the files of a URI."""
        shutil.rmtree(self._copies, ignore_errors=True)

    @property
    def _copies(self) -> Path:
        return Path(tempfile.gettempdir(), f"raybge-{os.getuid()}", digest(self.folder))

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name[:2], name)

    def _write(self, name: str, write: Callable[[Any], None]) -> None:
        with atomic_stream(self._files, self._path(name)) as out:
            write(out)

    def _local_path(self, name: str) -> str | Path:
        """Return the file's path on this machine; a file of a URI is copied first."""
        if self.local:
            return self._path(name)
        self._copies.mkdir(mode=0o700, parents=True, exist_ok=True)
        copy = self._copies / name
        if not copy.exists():
            partial = self._copies / f"{name}.{uuid.uuid4().hex}.tmp"
            pafs.copy_files(self._path(name), str(partial), source_filesystem=self._files)
            partial.rename(copy)
        return copy


@contextmanager
def work_folder(storage_path: str | None, name: str, default: str | None = None) -> Iterator[str]:
    """Provide the folder of a command's intermediate results.

    Args:
        storage_path: `--storage_path`; the folder is `name` in it.
        name: the command.
        default: folder if there is no storage path; None: a temporary folder of this machine, removed afterwards.

    Yields:
        Path or URI of the folder.
    """
    if storage_path or default:
        yield append_to_path(storage_path, f"/{name}") if storage_path else str(default)
    else:
        with TemporaryDirectory(prefix=f"raybge-{name}-") as folder:
            yield folder


@contextmanager
def run_store(output: OutputSpec, name: str, finished: bool, console: Console) -> Iterator[Store]:
    """Provide the store of a run that writes `output`.

    It is removed at the end of the run unless it is under `--storage_path`. A failed run keeps it from the moment when
    `keep_on_failure` is set, and says so.

    Args:
        output: the output of the run.
        name: the command, the store's folder name in the storage path.
        finished: True if the output exists already.
        console: receives the line on what is kept.

    Yields:
        The store.
    """
    with work_folder(output.storage_path, name, append_to_path(output.path, ".work")) as folder:
        store = Store(folder)
        # Work next to a finished output belongs to a run that was going to overwrite it: this run continues it.
        if output.overwrite and not (finished or output.dry_run or output.storage_path):
            store.remove()
        store.keep_on_failure = store.exists() or bool(output.storage_path)
        try:
            yield store
            store.keep_on_failure = bool(output.storage_path) or (store.keep_on_failure and output.dry_run)
        except BaseException:
            if store.keep_on_failure and store.exists():
                restarts = output.overwrite and not (finished or output.storage_path)
                console.message(
                    f"the work so far is kept in {store.folder}: the same command"
                    f"{' without --overwrite' if restarts else ''} continues with it"
                )
            raise
        finally:
            if not store.keep_on_failure:
                store.remove()


def _write_ipc(out: Any, table: pa.Table) -> None:
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def table_digest(table: pa.Table, *values: object) -> str:
    """Return 32 hexadecimal digits that identify the content of a table and JSON values."""
    state = hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16)
    state.update(table.schema.serialize())
    table = table.take(pa.array(range(len(table)), pa.int64()))  # a slice would serialize its neighboring rows too
    for batch in table.combine_chunks().to_batches():
        state.update(batch.serialize())
    return state.hexdigest()
