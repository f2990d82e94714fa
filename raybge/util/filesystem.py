"""Paths and URIs: the file system that each belongs to."""

import os

import pyarrow as pa
import pyarrow.fs as pafs

from raybge.util.errors import UserError, first_line

STATE_FOLDER = ".raybge"  # in the output folder: what a run keeps for itself


def filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """pyarrow's file system for a path or URI, and the path within it."""
    if "://" in path:
        return pafs.FileSystem.from_uri(path)
    return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))


def is_local(path: str, flag: str) -> bool:
    """Whether a path or URI means a folder of this machine. UserError naming `flag` for a URI that pyarrow does not
    know.
    """
    try:
        return "://" not in path or isinstance(filesystem(path)[0], pafs.LocalFileSystem)
    except (OSError, ValueError, ImportError, pa.ArrowException) as err:
        raise UserError(f"{flag}: {path} cannot be opened ({first_line(err)})") from err


def append_to_path(path: str, ending: str) -> str:
    """A path, or URI, with something at its end; a URI's query (region, endpoint) stays behind it."""
    head, mark, query = path.partition("?") if "://" in path else (path, "", "")
    return f"{head.rstrip('/')}{ending}{mark}{query}"
