"""Which files a path means, and how one is opened: local paths, folders, globs and the URIs that pyarrow
knows.
"""

import codecs
import fnmatch
import os
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa
import pyarrow.fs as pafs

from raybge.util.errors import UserError
from raybge.util.filesystem import append_to_path, filesystem
from raybge.util.redaction import redact

Kind = Literal["jsonl", "gzip", "zstd", "array", "parquet"]

ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "array",  # or JSON lines: the first byte tells
    ".jsonl.gz": "gzip",
    ".jsonl.zst": "zstd",
    ".parquet": "parquet",
}
BUFFER = 4 << 20  # bytes a read
SPACE = b" \t\r\n"  # JSON's own white space


@dataclass(frozen=True)
class SourceFile:
    """`name` is what the person calls the file, without the login that a URI may hold; `path` what is opened (absolute
    path or URI), `size` in bytes. `folder` is the folder that the person named and that this file was found in, or ""
    where the file itself was named.
    """

    name: str
    path: str
    size: int
    kind: Kind
    mtime_ns: int
    folder: str = ""


def list_files(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], flag: str) -> list[SourceFile]:
    """The data files behind paths, folders (recursive, in sorted order), globs and URIs.

    UserError naming `flag` and the path where there is nothing, the file is empty, or its ending is not one
    of `ENDINGS`.
    """
    names = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not names:
        raise UserError(f"{flag}: no path was given")
    files = []
    for name in [os.fspath(each) for each in names]:
        try:
            files += [_source(found, flag) for found in _find(name, flag)]
        except (OSError, pa.ArrowException) as err:
            raise UserError(f"{flag}: {name} cannot be opened ({err})") from err
    return files


@dataclass(frozen=True)
class _Found:
    name: str
    path: str
    info: pafs.FileInfo
    folder: str = ""


def _find(name: str, flag: str) -> list[_Found]:
    """Each data file behind one path."""
    info = _info(name)
    if info.type == pafs.FileType.File:
        return [_Found(name, _absolute(name), info)]
    if info.type == pafs.FileType.Directory:
        found = _in_folder(name)
        if not found:
            raise UserError(f"{flag}: the folder {name} holds no file that ends in one of {' '.join(ENDINGS)}")
        return found
    matches = _glob(name)
    if not matches:
        raise UserError(f"{flag}: {name} is not there")
    found = []
    for match in matches:
        info = _info(match)
        if info.type == pafs.FileType.Directory:
            found += _in_folder(match)
        elif _kind(info.path):
            found.append(_Found(match, _absolute(match), info))
    if not found:
        raise UserError(f"{flag}: {name} matches no file that ends in one of {' '.join(ENDINGS)}")
    return found


def _info(name: str) -> pafs.FileInfo:
    store, path = filesystem(name)
    return store.get_file_info(path)


def _absolute(name: str) -> str:
    return name if "://" in name else filesystem(name)[1]


def _in_folder(name: str) -> list[_Found]:
    store, root = filesystem(name)
    found = []
    for info in store.get_file_info(pafs.FileSelector(root, recursive=True)):
        relative = info.path[len(root) :].lstrip("/")
        hidden = any(part.startswith(".") for part in relative.split("/"))
        if info.type == pafs.FileType.File and not hidden and _kind(relative):
            child, path = _child(name, relative)
            found.append(_Found(child, path, info, name))
    return sorted(found, key=lambda each: each.name)


def _child(folder: str, relative: str) -> tuple[str, str]:
    """(name, path to open) of something within a folder; a URI keeps its query (region, endpoint)."""
    if "://" not in folder:
        name = os.path.join(folder, relative)
        return name, _absolute(name)
    shown = folder.partition("?")[0].rstrip("/")
    return f"{shown}/{relative}", append_to_path(folder, f"/{urllib.parse.quote(relative)}")


def _glob(name: str) -> list[str]:
    """Sorted matches of a pattern; "**" stands for any number of folders. Works on URIs, where "?" begins the
    query.
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
    found = _match(folder, pattern[1:]) if pattern[0] == "**" and len(pattern) > 1 else []
    for info in store.get_file_info(pafs.FileSelector(root)):
        base = info.base_name
        child = _child(folder, base)["://" in folder]  # of a URI the form that can be opened
        if pattern[0] == "**" and not base.startswith("."):
            found += _match(child, pattern) if info.type == pafs.FileType.Directory else _match(child, pattern[1:])
        elif fnmatch.fnmatchcase(base, pattern[0]) and (pattern[0].startswith(".") or not base.startswith(".")):
            found += _match(child, pattern[1:])
    return found


def _kind(path: str) -> Kind | None:
    lower = path.lower()
    return next((ENDINGS[ending] for ending in ENDINGS if lower.endswith(ending)), None)


def _source(found: _Found, flag: str) -> SourceFile:
    kind = _kind(found.info.path)
    if kind is None:
        raise UserError(f"{flag}: {found.name} must end in one of {' '.join(ENDINGS)}")
    if not found.info.size:
        raise UserError(f"{flag}: {found.name} is an empty file")
    file = SourceFile(
        redact(found.name), found.path, found.info.size, kind, found.info.mtime_ns or 0, redact(found.folder)
    )
    if kind == "array" and not _is_array(file):
        file = replace(file, kind="jsonl")
    return file


def _is_array(file: SourceFile) -> bool:
    with open_stream(file) as stream:
        head = stream.read(BUFFER).removeprefix(codecs.BOM_UTF8)
        while head and not head.strip(SPACE):
            head = stream.read(BUFFER)
    return head.lstrip(SPACE).startswith(b"[")


def open_stream(file: SourceFile) -> pa.NativeFile:
    """The file's bytes: seekable, except gzip and zstd, which are decompressed. UserError where it cannot be
    opened.
    """
    try:
        store, path = filesystem(file.path)
        if file.kind in ("gzip", "zstd"):
            return store.open_input_stream(path, compression=file.kind)
        return store.open_input_file(path)
    except (OSError, pa.ArrowException) as err:
        raise UserError(f"{file.name} cannot be opened ({err})") from err
