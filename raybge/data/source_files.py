"""Input files: find them by path, folder, glob or URI, and open them."""

from __future__ import annotations

import codecs
import fnmatch
import json
import os
import posixpath
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa
import pyarrow.fs as pafs

from raybge.data.groups import RowError
from raybge.data.saved_datasets import SPLITS, saved_files
from raybge.util.errors import UserError, first_line
from raybge.util.filesystem import append_to_path, filesystem
from raybge.util.redaction import redact

Kind = Literal["jsonl", "gzip", "zstd", "array", "parquet", "arrow"]

ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "array",  # or JSON lines, if the first character is not [
    ".jsonl.gz": "gzip",
    ".jsonl.zst": "zstd",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
BUFFER = 4 << 20  # bytes per read
_MAX_SUMMARY = 1 << 20  # bytes of a file of metrics
_SUMMARY_FIELDS = {"train_runtime", "log_history", "ignore_identical_ids"}  # of a training run, and of MTEB tasks
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
        any_text: texts that look like a list or a missing value are texts (--accept_any_text).
    """

    name: str
    path: str
    size: int
    kind: Kind
    mtime_ns: int
    folder: str = ""
    any_text: bool = False


def list_files(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], flag: str, any_text: bool = False
) -> list[SourceFile]:
    """Return the data files of paths, folders (recursive, in sorted order), globs and URIs.

    Of a folder, hidden files and those that raybge writes beside its results are no data.

    Args:
        paths: one or several of them.
        flag: flag that an error message names.
        any_text: see `SourceFile`.

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
            files += [_source_file(match, flag, any_text) for match in _find(name, flag)]
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
        files = _in_folder(name, flag)
        if not files:
            raise UserError(f"{flag}: the folder {name} holds no file that ends in one of {' '.join(ENDINGS)}")
        return files
    paths = _glob(name)
    if not paths:
        raise UserError(f"{flag}: {name}: no such file or folder")
    files = []
    for path in paths:
        info = _info(path)
        if _is_internal(info.base_name):
            continue
        if info.type == pafs.FileType.Directory:
            files += _in_folder(path, flag)
        elif _kind(info.path) and not _is_summary(filesystem(path)[0], info):
            files.append(_Match(path, _absolute(path), info))
    if not files:
        raise UserError(f"{flag}: {name} matches no file that ends in one of {' '.join(ENDINGS)}")
    return files


def _info(name: str) -> pafs.FileInfo:
    store, path = filesystem(name)
    return store.get_file_info(path)


def _absolute(name: str) -> str:
    return name if "://" in name else filesystem(name)[1]


def _in_folder(name: str, flag: str) -> list[_Match]:
    store, root = filesystem(name)
    infos = store.get_file_info(pafs.FileSelector(root, recursive=True))
    paths = {info.path[len(root) :].lstrip("/"): info for info in infos if info.type == pafs.FileType.File}
    paths = {relative: info for relative, info in paths.items() if not _is_internal(relative)}
    saved = saved_files(store, root, [*paths], f"{flag}: {name}")
    data_sets = {posixpath.dirname(each) for each in saved}

    def is_beside(relative: str) -> bool:
        """Return True for the other files of a data set of datasets.save_to_disk."""
        return posixpath.dirname(relative) in data_sets or (bool(saved) and relative == SPLITS)

    files = []
    for relative, info in paths.items():
        place = saved.get(relative)
        if place is None and (is_beside(relative) or not _kind(relative) or _is_summary(store, info)):
            continue
        child, path = _child(name, relative)
        order = (child, 0) if place is None else (posixpath.dirname(child) + "/", place)
        files.append((order, _Match(child, path, info, name)))
    return [match for _, match in sorted(files, key=lambda each: each[0])]


def _is_internal(relative: str) -> bool:
    """Return True for a hidden path, for raybge's own files beside an output, and for Spark's unfinished files."""
    parts = relative.split("/")
    return any(part.startswith((".", "_temporary")) or part.endswith((".work", ".meta.json")) for part in parts)


def _is_summary(store: pafs.FileSystem, info: pafs.FileInfo) -> bool:
    """Return True for a file of metrics, of raybge or transformers' Trainer: one JSON object over several lines."""
    if not info.path.lower().endswith(".json") or info.size > _MAX_SUMMARY:
        return False
    with store.open_input_stream(info.path) as stream:
        content = stream.read()
    if not content.startswith(b"{\n"):
        return False
    try:
        return any("@" in name or name in _SUMMARY_FIELDS for name in json.loads(content))
    except ValueError:
        return False


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
        if pattern[0] == "**":
            if _is_internal(base):
                continue
            matches += _match(child, pattern) if info.type == pafs.FileType.Directory else _match(child, pattern[1:])
        elif fnmatch.fnmatchcase(base, pattern[0]) and (pattern[0].startswith(".") or not base.startswith(".")):
            matches += _match(child, pattern[1:])
    return matches


def _kind(path: str) -> Kind | None:
    lower = path.lower()
    return next((ENDINGS[ending] for ending in ENDINGS if lower.endswith(ending)), None)


def _source_file(match: _Match, flag: str, any_text: bool) -> SourceFile:
    kind, info = _kind(match.info.path), match.info
    if kind is None:
        raise UserError(f"{flag}: {match.name} must end in one of {' '.join(ENDINGS)}")
    if not info.size:
        raise UserError(f"{flag}: {match.name} is an empty file")
    name, folder = redact(match.name), redact(match.folder)
    file = SourceFile(name, match.path, info.size, kind, info.mtime_ns or 0, folder, any_text)
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
