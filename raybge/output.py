"""Files that appear under their name only when they are whole."""

from __future__ import annotations

import glob
import os
import platform
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from raybge.data.files import filesystem
from raybge.errors import UserError

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
def written_aside(path: str, flag: str) -> Iterator[pa.NativeFile]:
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


def _discard_left_over(place: Path) -> None:
    """Delete what processes of this machine left that are gone."""
    for path in place.parent.glob(f"{glob.escape(place.name)}.part-{glob.escape(platform.node())}-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
