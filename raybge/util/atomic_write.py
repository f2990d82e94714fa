"""Files that appear under their name only when they are whole."""

from __future__ import annotations

import glob
import os
import platform
import posixpath
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from raybge.util.errors import UserError
from raybge.util.filesystem import filesystem

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def exists(path: str, flag: str) -> bool:
    """Whether there is a file at a path or URI; UserError naming `flag` for a folder."""
    try:
        store, place = filesystem(path)
        info = store.get_file_info(place)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{flag}: {path} cannot be written ({error})") from error
    if info.type == pafs.FileType.Directory:
        raise UserError(f"{flag}: {path} is a folder, expected a file's name")
    return bool(info.type != pafs.FileType.NotFound)


@contextmanager
def open_atomic(path: str, flag: str) -> Iterator[pa.NativeFile]:
    """A stream into `path` (or URI), compressed as its ending says; missing folders are made.

    What is written lies beside it as `path.part-HOST-PID` and gets its name when the block ends without an error;
    else it is removed, or if the process is killed, when the file is next written. UserError naming `flag` where
    nothing can be written.
    """
    try:
        store, place = filesystem(path)
        aside = f"{place}.part-{platform.node()}-{os.getpid()}"
        if isinstance(store, pafs.LocalFileSystem):
            _discard_left_over(Path(place))
        store.create_dir(posixpath.dirname(place), recursive=True)
        compression = COMPRESSION.get(os.path.splitext(place)[1])
        stream = store.open_output_stream(aside, compression=compression)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{flag}: {path} cannot be written ({error})") from error
    try:
        with stream:
            yield stream
        store.move(aside, place)
    except BaseException:
        if store.get_file_info(aside).is_file:
            store.delete_file(aside)
        raise


@contextmanager
def atomic_folder(path: str, flag: str, last: str | None = None) -> Iterator[str]:
    """A folder to write files into, as its place on the file system of `path`; the empty file `last`, where one is
    wanted, comes last.

    A local one lies beside `path` until the block ends without an error; then it takes its name, and the place of what
    was there. At a URI, where folders cannot be renamed, the file `last` alone says that the folder is whole. UserError
    naming `flag` where nothing can be written.
    """
    try:
        store, place = filesystem(path)
        place = place.rstrip("/")
        local = isinstance(store, pafs.LocalFileSystem)
        aside = f"{place}.part-{platform.node()}-{os.getpid()}" if local else place
        if local:
            _discard_left_over(Path(place))
        if store.get_file_info(aside).type == pafs.FileType.Directory:
            store.delete_dir(aside)
        store.create_dir(aside, recursive=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{flag}: {path} cannot be written ({error})") from error
    try:
        yield aside
        if last is not None:
            store.open_output_stream(posixpath.join(aside, last)).close()
        if local:
            shutil.rmtree(place, ignore_errors=True)
            store.move(aside, place)
    except BaseException:
        store.delete_dir(aside)
        raise


def _discard_left_over(place: Path) -> None:
    """Delete what processes of this machine left that are gone."""
    for path in place.parent.glob(f"{glob.escape(place.name)}.part-{glob.escape(platform.node())}-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
