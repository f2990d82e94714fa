"""Input files: find them by path, folder, glob or URI, and open them."""

from __future__ import annotations

import codecs
import fnmatch
import os
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa
import pyarrow.fs as pafs

from raybge.data.groups import RowError
from raybge.util.errors import UserError, first_line
from raybge.util.filesystem import append_to_path, filesystem
from raybge.util.redaction import redact

Kind = Literal["jsonl", "gzip", "zstd", "array", "parquet"]

ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "array",  # or JSON lines, if the first character is not [
    ".jsonl.gz": "gzip",
    ".jsonl.zst": "zstd",
    ".parquet": "parquet",
}
BUFFER = 4 << 20  # bytes per read
SPACE = b" \t\r\n"  # JSON's own white space


@dataclass(frozen=True)
class SourceFile:
    """Input file.

    Args:
        name: path as the user wrote it, without credentials; for messages.
        path: absolute path or URI to open.
        size: bytes.
        kind: format of the file.
        mtime_ns: modification time in nanoseconds, 0 if unknown.
        folder: the folder that the user named and that contains the file; "" if the file itself was named.
    """

    name: str
    path: str
    size: int
    kind: Kind
    mtime_ns: int
    folder: str = ""


def list_files(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], flag: str) -> list[SourceFile]:
    """Return the data files of paths, folders (recursive, in sorted order), globs and URIs.

    Args:
        paths: one or several of them.
        flag: flag that an error message names.

    Returns:
        The files in the order of `paths`.

    Raises:
        UserError: nothing is there, a file is empty, or its ending is not one of `ENDINGS`.
    """
    names = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not names:
        raise UserError(f"{flag}: no path was given")
    files = []
    for name in [os.fspath(each) for each in names]:
        try:
            files += [_source_file(match, flag) for match in _find(name, flag)]
        except (OSError, pa.ArrowException) as err:
            raise UserError(f"{flag}: {name} cannot be opened ({err})") from err
    return files


@dataclass(frozen=True)
class _Match:
    name: str
    path: str
    info: pafs.FileInfo
    folder: str = ""


def _find(name: str, flag: str) -> list[_Match]:
    """Return each data file that one path stands for."""
    info = _info(name)
    if info.type == pafs.FileType.File:
        return [_Match(name, _absolute(name), info)]
    if info.type == pafs.FileType.Directory:
        files = _in_folder(name)
        if not files:
            raise UserError(f"{flag}: the folder {name} holds no file that ends in one of {' '.join(ENDINGS)}")
        return files
    paths = _glob(name)
    if not paths:
        raise UserError(f"{flag}: {name}: no such file or folder")
    files = []
    for path in paths:
        info = _info(path)
        if info.type == pafs.FileType.Directory:
            files += _in_folder(path)
        elif _kind(info.path):
            files.append(_Match(path, _absolute(path), info))
    if not files:
        raise UserError(f"{flag}: {name} matches no file that ends in one of {' '.join(ENDINGS)}")
    return files


def _info(name: str) -> pafs.FileInfo:
    store, path = filesystem(name)
    return store.get_file_info(path)


def _absolute(name: str) -> str:
    return name if "://" in name else filesystem(name)[1]


def _in_folder(name: str) -> list[_Match]:
    store, root = filesystem(name)
    files = []
    for info in store.get_file_info(pafs.FileSelector(root, recursive=True)):
        relative = info.path[len(root) :].lstrip("/")
        hidden = any(part.startswith(".") for part in relative.split("/"))
        if info.type == pafs.FileType.File and not hidden and _kind(relative):
            child, path = _child(name, relative)
            files.append(_Match(child, path, info, name))
    return sorted(files, key=lambda each: each.name)


def _child(folder: str, relative: str) -> tuple[str, str]:
    """Return (name, path to open) of a path within a folder; a URI keeps its query (region, endpoint)."""
    if "://" not in folder:
        name = os.path.join(folder, relative)
        return name, _absolute(name)
    shown = folder.partition("?")[0].rstrip("/")
    return f"{shown}/{relative}", append_to_path(folder, f"/{urllib.parse.quote(relative)}")


def _glob(name: str) -> list[str]:
    """Return the sorted matches of a pattern, where "**" stands for any number of folders.

    In URIs "?" begins the query.
    """
    wild = "*[" if "://" in name else "*?["
    head, mark, query = name.partition("?") if "://" in name else (name, "", "")
    parts = head.split("/")
    first = next((at for at, part in enumerate(parts) if any(char in part for char in wild)), None)
    if first is None:
        return []
    base = "/".join(parts[:first]) or ("/" if head.startswith("/") else "")
    matches = _match(base + mark + query, parts[first:])
    return sorted(set(matches))


def _match(folder: str, pattern: list[str]) -> list[str]:
    if not pattern:
        return [folder]
    store, root = filesystem(folder or ".")
    if store.get_file_info(root).type != pafs.FileType.Directory:
        return []
    matches = _match(folder, pattern[1:]) if pattern[0] == "**" and len(pattern) > 1 else []
    for info in store.get_file_info(pafs.FileSelector(root)):
        base = info.base_name
        child = _child(folder, base)["://" in folder]  # of a URI the form to open
        if pattern[0] == "**" and not base.startswith("."):
            matches += _match(child, pattern) if info.type == pafs.FileType.Directory else _match(child, pattern[1:])
        elif fnmatch.fnmatchcase(base, pattern[0]) and (pattern[0].startswith(".") or not base.startswith(".")):
            matches += _match(child, pattern[1:])
    return matches


def _kind(path: str) -> Kind | None:
    lower = path.lower()
    return next((ENDINGS[ending] for ending in ENDINGS if lower.endswith(ending)), None)


def _source_file(match: _Match, flag: str) -> SourceFile:
    kind, info = _kind(match.info.path), match.info
    if kind is None:
        raise UserError(f"{flag}: {match.name} must end in one of {' '.join(ENDINGS)}")
    if not info.size:
        raise UserError(f"{flag}: {match.name} is an empty file")
    file = SourceFile(redact(match.name), match.path, info.size, kind, info.mtime_ns or 0, redact(match.folder))
    if kind == "array" and not _is_array(file):
        file = replace(file, kind="jsonl")
    return file


def _is_array(file: SourceFile) -> bool:
    with open_stream(file) as stream:
        head = stream.read(BUFFER).removeprefix(codecs.BOM_UTF8)
        while head and not head.strip(SPACE):
            head = stream.read(BUFFER)
    return bool(head.lstrip(SPACE).startswith(b"["))


def open_stream(file: SourceFile) -> pa.NativeFile:
    """Open a file for reading: seekable, except gzip and zstd, which are decompressed.

    Raises UserError if the file cannot be opened.
    """
    try:
        store, path = filesystem(file.path)
        if file.kind in ("gzip", "zstd"):
            return store.open_input_stream(path, compression=file.kind)
        return store.open_input_file(path)
    except (OSError, pa.ArrowException) as err:
        raise UserError(f"{file.name} cannot be opened ({err})") from err


def damage_error(kind: str, err: Exception) -> RowError:
    """Return the error of a row at which pyarrow finds that a file is truncated or damaged."""
    return RowError("", f"must be part of a whole {kind} file, found damage at or after this row ({first_line(err)})")
