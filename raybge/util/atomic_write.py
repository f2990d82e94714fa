"""Files and folders that appear under their name only when they are complete."""

from __future__ import annotations

import glob
import os
import platform
import posixpath
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from raybge.util.errors import UserError
from raybge.util.filesystem import filesystem

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def exists(path: str, flag: str) -> bool:
    """Return True if there is a file at a path or URI.

    Raises UserError if it is a folder, or cannot be reached.
    """
    try:
        store, place = filesystem(path)
        info = store.get_file_info(place)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{flag}: {path} cannot be written ({error})") from error
    if info.type == pafs.FileType.Directory:
        raise UserError(f"{flag}: {path} is a folder, expected the name of a file")
    return bool(info.type != pafs.FileType.NotFound)


@contextmanager
def atomic_stream(store: pafs.FileSystem, place: str) -> Iterator[pa.NativeFile]:
    """Open a stream to a file that appears at the end of the block; several processes may write the same file.

    For files whose name is a digest of their content: the last process to finish replaces equal bytes.

    Args:
        store: file system of the file.
        place: path within it; missing folders are created.

    Yields:
        The stream. If the block raises, what was written is deleted.
    """
    store.create_dir(posixpath.dirname(place), recursive=True)
    partial = f"{place}.{uuid.uuid4().hex}.tmp"
    with _moved_when_complete(store, partial, place):
        with store.open_output_stream(partial, compression=None) as stream:
            yield stream


@contextmanager
def open_atomic(path: str, flag: str) -> Iterator[pa.NativeFile]:
    """Open a stream to an output file, which appears at the end of the block; its ending selects the compression.

    The partial file is `path.part-HOST-PID`. If the block raises, it is deleted; if the process is killed, the next
    process that writes the same output deletes it.

    Args:
        path: path or URI; missing folders are created.
        flag: flag that an error message names.

    Yields:
        The stream.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        store, place = filesystem(path)
        partial = _partial_name(place)
        if isinstance(store, pafs.LocalFileSystem):
            _delete_leftovers(Path(place))
        store.create_dir(posixpath.dirname(place), recursive=True)
        compression = COMPRESSION.get(os.path.splitext(place)[1])
        stream = store.open_output_stream(partial, compression=compression)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{flag}: {path} cannot be written ({error})") from error
    with _moved_when_complete(store, partial, place), stream:
        yield stream


@contextmanager
def atomic_folder(path: str, flag: str, last: str | None = None, keep_existing: bool = False) -> Iterator[str]:
    """Create a folder that is complete at the end of the block, and replaces an existing one.

    A local folder gets its name at the end. At a URI, where folders cannot be renamed, only the file `last` shows that
    the folder is complete.

    Args:
        path: path or URI of the folder.
        flag: flag that an error message names.
        last: name of an empty file that is written into the folder after everything else.
        keep_existing: a local folder that exists at the end stays, and the new one is deleted: for folders named by a
            digest of their content, which another process may be reading.

    Yields:
        The folder to write into, as a path within the file system of `path`.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        store, place = filesystem(path)
        place = place.rstrip("/")
        local = isinstance(store, pafs.LocalFileSystem)
        partial = _partial_name(place) if local else place
        if local:
            _delete_leftovers(Path(place))
        if store.get_file_info(partial).type == pafs.FileType.Directory:
            store.delete_dir(partial)
        store.create_dir(partial, recursive=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{flag}: {path} cannot be written ({error})") from error
    try:
        yield partial
        if last is not None:
            store.open_output_stream(posixpath.join(partial, last)).close()
        if local and keep_existing and os.path.isdir(place):
            shutil.rmtree(partial)
        elif local:
            shutil.rmtree(place, ignore_errors=True)
            store.move(partial, place)
    except BaseException:
        # object stores have no empty folders
        if store.get_file_info(partial).type == pafs.FileType.Directory:
            store.delete_dir(partial)
        raise


@contextmanager
def _moved_when_complete(store: pafs.FileSystem, partial: str, place: str) -> Iterator[None]:
    """Rename a file after the block, or delete it if the block raises."""
    try:
        yield
        store.move(partial, place)
    except BaseException:
        if store.get_file_info(partial).is_file:
            store.delete_file(partial)
        raise


def _partial_name(place: str) -> str:
    return f"{place}.part-{platform.node()}-{os.getpid()}"


def _delete_leftovers(place: Path) -> None:
    """Delete partial files and folders of dead processes of this machine."""
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
