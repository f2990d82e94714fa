"""Convert compressed files, JSON arrays and Parquet to plain .jsonl, which many readers can share."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from raybge.cluster.remote_calls import ray_is_connected, unwrap_user_errors
from raybge.data.groups import RowError
from raybge.data.json_array import array_elements
from raybge.data.jsonl import BadRow, cut, scan
from raybge.data.source_files import BUFFER, SourceFile, open_stream
from raybge.data.survey import IN_PROCESS_BYTES, file_fingerprint
from raybge.util.atomic_write import atomic_stream
from raybge.util.errors import UserError
from raybge.util.filesystem import append_to_path, filesystem


def transcode(
    files: Sequence[SourceFile], folder: str, kinds: Sequence[str] = ("gzip", "zstd", "array", "arrow")
) -> list[SourceFile]:
    """Replace the files of some kinds by plain .jsonl files.

    A file is written once, under a name that contains its fingerprint, and reused. Lines keep their numbers (in arrays:
    the number of the element). Above 64 MiB the files are written by Ray tasks if Ray is connected.

    Args:
        files: the files.
        folder: local folder or URI for the new files; on a cluster every node has to see it.
        kinds: kinds of files to replace.

    Returns:
        The files in the same order; `name` is still the user's.

    Raises:
        UserError: a file is damaged or has no rows.
    """
    folder = folder if "://" in folder else os.path.abspath(folder)
    packed = [file for file in files if file.kind in kinds]
    if ray_is_connected() and sum(file.size for file in packed) > IN_PROCESS_BYTES:
        import ray

        task = ray.remote(_transcode)
        with unwrap_user_errors():
            results = ray.get([task.remote(file, folder) for file in packed])
        plain = dict(zip(packed, results, strict=True))
    else:
        plain = {file: _transcode(file, folder) for file in packed}
    return [plain.get(file, file) for file in files]


def _transcode(file: SourceFile, folder: str) -> SourceFile:
    stem = posixpath.basename(file.name).split(".")[0]
    target = append_to_path(folder, f"/{stem}-{file_fingerprint(file)}.jsonl")
    store, path = filesystem(target)
    info = store.get_file_info(path)
    if not info.is_file:
        with atomic_stream(store, path) as out, open_stream(file) as packed:
            UNPACK[file.kind](file, packed, out)
        info = store.get_file_info(path)
    if not info.size:
        raise UserError(f"{file.name} holds no rows")
    return replace(file, path=target, size=info.size, kind="jsonl", mtime_ns=info.mtime_ns or 0)


def _unpack(file: SourceFile, packed: pa.NativeFile, out: pa.NativeFile) -> None:
    while True:
        try:
            data = packed.read(BUFFER)
        except OSError as err:
            raise UserError(f"{file.name} is not a whole {file.kind} file ({err})") from err
        if not data:
            return
        out.write(data)


def _unpack_array(file: SourceFile, packed: pa.NativeFile, out: pa.NativeFile) -> None:
    for number, text in array_elements(packed):
        if isinstance(text, RowError):
            raise UserError(f"{file.name}:{number + 1}: the row {text.expected}")
        # invalid UTF-8 is copied; reading the row reports it
        out.write(text.encode(errors="surrogateescape") + b"\n")


def _unpack_table(file: SourceFile, packed: pa.NativeFile, out: pa.NativeFile) -> None:
    for block in cut([file], file.size):
        for row, text in scan(file, block, dict):
            if isinstance(row, BadRow):
                raise UserError(f"{file.name}:{row.line}: {row.subject} {row.expected}")
            out.write(text.encode() + b"\n")


UNPACK = {
    "gzip": _unpack,
    "zstd": _unpack,
    "array": _unpack_array,
    "parquet": _unpack_table,
    "arrow": _unpack_table,
}
