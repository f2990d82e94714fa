"""Read rows of text: JSON lines (plain, gzip, zstd), JSON arrays and Parquet, from local paths or URIs.

A plain file is cut into blocks, which are byte ranges, so that many readers share one file: a block owns the lines that
begin in it, and reads past its end to finish its last line. A row is identified by (file, offset), whatever the cut.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raybge.data.arrow_rows import arrow_rows
from raybge.data.groups import RowError, check_texts
from raybge.data.json_array import JSON, array_elements, read_constant, utf8_text
from raybge.data.parquet import parquet_rows, row_group_sizes
from raybge.data.source_files import BUFFER, SPACE, SourceFile, damage_error, list_files, open_stream

__all__ = ["BadRow", "Block", "Row", "RowError", "SourceFile", "cut", "list_files", "read_block", "read_rows", "scan"]

Parse = Callable[[dict[str, Any]], Any]
# offset; the row's JSON text, an error, or None for a blank line
Element = tuple[int, str | RowError | None]

TAIL = 64 << 10  # bytes per read past a block's end, to finish its last line
# beginning of a line of JSON in UTF-16 or UTF-32, with or without a byte order mark
_WIDE = re.compile(rb"\0{0,2}(\xff\xfe|\xfe\xff)\0*|\0*[\[{]\0{1,3}|\0+[\[{]")
_END = 1 << 62  # "to the end of the stream"


@dataclass(frozen=True)
class Block:
    """Part of files[file]: the lines that begin in bytes [start, stop), or the row groups [start, stop) of Parquet.

    Reading gzip, zstd and array files can only start at their beginning: they are one block each.
    """

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    """Row of a file.

    Args:
        file: index of the file.
        offset: byte at which the line starts, in the decompressed stream for gzip and zstd; for arrays and Parquet the
            0-based number of the row.
        line: 1-based number of the line within its block.
        raw: the JSON object.
        value: result of `parse` for it.
    """

    file: int
    offset: int
    line: int
    raw: dict[str, Any]
    value: Any


@dataclass(frozen=True)
class BadRow:
    """Invalid row; `expected` continues a sentence that begins with `field`, which is "" for the row as a whole."""

    file: int
    offset: int
    line: int
    field: str
    expected: str

    @property
    def subject(self) -> str:
        """Beginning of the sentence: the field, or the row."""
        return f'"{self.field}"' if self.field else "the row"


# ---- cutting and reading -----------------------------------------------------------------------------------


def cut(files: Sequence[SourceFile], block_bytes: int) -> list[Block]:
    """Cut files into blocks of about `block_bytes` bytes, in file order.

    The result depends on nothing else. Parquet blocks are whole row groups of at least that many uncompressed bytes.

    Raises UserError if a Parquet file cannot be opened.
    """
    blocks: list[Block] = []
    for index, file in enumerate(files):
        if file.kind == "jsonl":
            edges = [*range(0, file.size, block_bytes), file.size]
        elif file.kind == "parquet":
            edges = _row_group_edges(file, block_bytes)
        else:
            edges = [0, file.size]
        blocks += [Block(index, start, stop) for start, stop in itertools.pairwise(edges)]
    return blocks


def _row_group_edges(file: SourceFile, block_bytes: int) -> list[int]:
    edges, size = [0], 0
    sizes = row_group_sizes(file)
    for group, group_bytes in enumerate(sizes):
        size += group_bytes
        if size >= block_bytes or group + 1 == len(sizes):
            edges.append(group + 1)
            size = 0
    return edges


def read_block(files: Sequence[SourceFile], block: Block, parse: Parse) -> Iterator[Row | BadRow]:
    """Yield the rows of one block in order; blank lines are skipped, but count as lines."""
    for row, _ in scan(files[block.file], block, parse):
        if row is not None:
            yield row


def scan(file: SourceFile, block: Block, parse: Parse) -> Iterator[tuple[Row | BadRow | None, str]]:
    """Yield (row, its JSON text) of each physical line of a block.

    (None, "") for a blank line; the text of an invalid row is "".
    """
    for line, (offset, text) in enumerate(_elements(file, block), start=1):
        row = None if text is None else _row(block, offset, line, text, parse, file.any_text)
        if not isinstance(row, Row) or not isinstance(text, str):
            yield row, ""
        elif "NaN" in text or "Infinity" in text:
            yield row, json.dumps(row.raw, ensure_ascii=False)  # other readers refuse these numbers
        else:
            yield row, text


def _row(block: Block, offset: int, line: int, text: str | RowError, parse: Parse, any_text: bool) -> Row | BadRow:
    try:
        if isinstance(text, RowError):
            raise text
        raw = _object(text)
        value = parse(raw)
        if not any_text:
            check_texts(raw, value)
        return Row(block.file, offset, line, raw, value)
    except RowError as err:
        return BadRow(block.file, offset, line, err.field, err.expected)


def read_rows(
    stream: pa.NativeFile, block: Block, parse: Parse, wanted: Collection[int], all_good: bool, any_text: bool = False
) -> dict[int, Row]:
    """Read some rows of a block by their numbers among its valid rows, counted from 0.

    Args:
        stream: the open .jsonl file.
        block: block of the file.
        parse: makes the value of a row.
        wanted: numbers of the rows.
        all_good: the survey has found that every line of the block is a valid row; then rows are located by counting
            lines, and the others are not parsed.
        any_text: of the `SourceFile`.

    Returns:
        Rows by number. A number is missing if the file has changed and the block no longer has it.
    """
    stream.seek(0)  # `_lines` expects the stream at its start
    rows: dict[int, Row] = {}
    number, last = 0, max(wanted, default=-1)
    for line, (offset, data) in enumerate(_lines(stream, block.start, block.stop), start=1):
        if number > last:
            break
        if all_good and number not in wanted:
            number += 1
            continue
        text = _line_text(offset, data)
        row = None if text is None else _row(block, offset, line, text, parse, any_text)
        if isinstance(row, Row):
            if number in wanted:
                rows[number] = row
            number += 1
        elif all_good:
            break  # the file has changed
    return rows


def _elements(file: SourceFile, block: Block) -> Iterator[Element]:
    with open_stream(file) as stream:
        if file.kind == "parquet":
            yield from parquet_rows(stream, block.start, block.stop)
        elif file.kind == "arrow":
            yield from arrow_rows(stream)
        elif file.kind == "array":
            for number, text in array_elements(stream):
                yield number, utf8_text(text) if isinstance(text, str) else text
        elif file.kind == "jsonl":
            for offset, data in _lines(stream, block.start, block.stop):
                yield offset, _line_text(offset, data)
        else:
            yield from _compressed_elements(stream, file.kind)


def _lines(stream: pa.NativeFile, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes without the line feed) of the lines that begin in [start, stop)."""
    position = max(start - 1, 0)  # a line begins at `start` exactly where the byte before it is a line feed
    if position:
        stream.seek(position)
    offset, parts, skipping = position, [b""], start > 0
    while data := stream.read(min(BUFFER, max(stop - position, 0) + TAIL)):
        position += len(data)
        pieces = data.split(b"\n")
        if skipping and len(pieces) == 1:
            continue  # inside a line of an earlier block
        if skipping:
            offset = position - len(data) + len(pieces.pop(0)) + 1
            skipping = False
        parts.append(pieces[0])  # joined once, so that a line of many buffers is not copied for each of them
        if len(pieces) > 1:
            pieces[0] = b"".join(parts)
            parts = [pieces.pop()]
            for piece in pieces:
                if offset >= stop:
                    return
                yield offset, piece
                offset += len(piece) + 1
        if offset >= stop:
            return
    last = b"".join(parts)
    if last and not skipping:
        yield offset, last


def _line_text(offset: int, data: bytes) -> str | RowError | None:
    if offset == 0:
        data = data.removeprefix(codecs.BOM_UTF8)
    data = data.strip(SPACE)
    if not data:
        return None
    if match := _WIDE.match(data):
        encoding = "UTF-32" if b"\0\0" in match[0] else "UTF-16"
        return RowError("", f"must be UTF-8 text, found {encoding}; convert the file: iconv -f {encoding} -t UTF-8")
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        return RowError("", f"must be UTF-8 text, found byte 0x{data[err.start]:02x} at byte {err.start + 1}")


def _compressed_elements(stream: pa.NativeFile, kind: str) -> Iterator[Element]:
    offset = 0
    try:
        for offset, data in _lines(stream, 0, _END):
            yield offset, _line_text(offset, data)
    except OSError as err:
        yield offset, damage_error(kind, err)


# ---- JSON --------------------------------------------------------------------------------------------------


class _AmbiguousObject(dict[str, Any]):
    """Object in which `key` has two different values."""

    key: str


def _check_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs; an ambiguous one is an error only as a row, not inside an unread field."""
    raw = dict(pairs)
    if len(raw) == len(pairs):
        return raw
    first: dict[str, Any] = {}
    for key, value in pairs:
        if first.setdefault(key, value) != value:
            raw = _AmbiguousObject(raw)
            raw.key = key
            break
    return raw


_CHECKED_JSON = json.JSONDecoder(parse_constant=read_constant, object_pairs_hook=_check_keys)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _object(text: str) -> dict[str, Any]:
    not_json = "must be a JSON object, found text that is not JSON"
    try:
        raw, end = _CHECKED_JSON.raw_decode(text)
        if end != len(text):
            JSON.decode(text)  # raises the error with its place, unless white space follows
    except json.JSONDecodeError as err:
        raise RowError("", f"{not_json} ({err.msg}, column {err.colno})") from err
    except (ValueError, RecursionError) as err:
        # a number of thousands of digits, brackets nested too deep
        raise RowError("", f"{not_json} ({err})") from err
    if not isinstance(raw, dict):
        names = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}
        raise RowError("", f"must be a JSON object, found {names.get(type(raw), 'a number')}")
    if isinstance(raw, _AmbiguousObject):
        raise RowError(_printable(raw.key), "must occur once in a row, found it twice with different values")
    # Half of a surrogate pair, escaped, is valid JSON but no text that can be written. Most rows have no backslash, and
    # the search for one character is much faster than for a pattern.
    if "\\" in text and _SURROGATE.search(text):
        for field, value in raw.items():
            if isinstance(utf8_text(json.dumps([field, value], ensure_ascii=False)), RowError):
                message = "must be text, found half of a surrogate pair (\\ud800 to \\udfff)"
                raise RowError(_printable(field), message)
    return raw


def _printable(field: str) -> str:
    return field.encode(errors="backslashreplace").decode()
