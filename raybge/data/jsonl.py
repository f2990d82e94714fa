"""Read rows of text: JSON lines (plain, gzip, zstd), JSON arrays and Parquet, from disk or from a URI that
pyarrow opens.

A plain file is cut into byte ranges at line ends, so that many readers share one file: a block owns the lines
that begin in it, and reads past its end to finish its last line. A row is known by (file, offset), which no
cut changes.
"""

import base64
import codecs
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raybge.data.groups import RowError
from raybge.data.source_files import BUFFER, SPACE, SourceFile, list_files, open_stream
from raybge.util.errors import UserError, first_line

__all__ = ["BadRow", "Block", "Row", "RowError", "SourceFile", "cut", "list_files", "read_block", "read_rows", "scan"]

Parse = Callable[[dict[str, Any]], Any]
# offset; the row's JSON text, what is wrong with it, or None for a blank line
Element = tuple[int, "str | RowError | None"]

TAIL = 64 << 10  # bytes read at once past a block's end, to finish its last line
# characters after which an array element is taken for a broken one: bounds the memory
LONGEST_ELEMENT = 256 << 20
_END = 1 << 62  # "to the end of the stream"


@dataclass(frozen=True)
class Block:
    """A part of files[file]: the lines that begin in bytes [start, stop); for Parquet the row groups [start,
    stop).

    gzip, zstd and array files cannot be entered in the middle: one block each.
    """

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    """`offset`: byte of the line's start (of the decompressed stream for gzip and zstd; the 0-based row
    number for arrays and Parquet). `line`: 1-based within its block. `raw`: the object as it is in the file.
    `value`: what `parse` made of it.
    """

    file: int
    offset: int
    line: int
    raw: dict[str, Any]
    value: Any


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: `field` is "" where the row as a whole is wrong, `expected` reads on after
    the field's name.
    """

    file: int
    offset: int
    line: int
    field: str
    expected: str


# ---- cutting and reading -----------------------------------------------------------------------------------


def cut(files: Sequence[SourceFile], block_bytes: int) -> list[Block]:
    """Blocks of about `block_bytes` bytes in file order: a function of the files and `block_bytes` alone.
    Parquet blocks are whole row groups of at least that many uncompressed bytes. UserError where a Parquet
    file cannot be opened.
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
    try:
        with open_stream(file) as stream:
            metadata = pq.read_metadata(stream)
    except (OSError, pa.ArrowException) as err:
        raise UserError(f"{file.name} is not a whole Parquet file ({err})") from err
    edges, held = [0], 0
    for group in range(metadata.num_row_groups):
        held += metadata.row_group(group).total_byte_size
        if held >= block_bytes or group + 1 == metadata.num_row_groups:
            edges.append(group + 1)
            held = 0
    return edges


def read_block(files: Sequence[SourceFile], block: Block, parse: Parse) -> Iterator[Row | BadRow]:
    """The rows of one block, in order and streamed; blank lines are passed over, but count as lines."""
    for row, _ in scan(files[block.file], block, parse):
        if row is not None:
            yield row


def scan(file: SourceFile, block: Block, parse: Parse) -> Iterator[tuple[Row | BadRow | None, str]]:
    """Each physical line of a block as (row, its JSON text); (None, "") for a blank line, text "" for a bad
    row.
    """
    for line, (offset, text) in enumerate(_elements(file, block), start=1):
        row = None if text is None else _row(block, offset, line, text, parse)
        yield row, text if isinstance(row, Row) and isinstance(text, str) else ""


def _row(block: Block, offset: int, line: int, text: str | RowError, parse: Parse) -> Row | BadRow:
    try:
        if isinstance(text, RowError):
            raise text
        raw = _object(text)
        return Row(block.file, offset, line, raw, parse(raw))
    except RowError as err:
        return BadRow(block.file, offset, line, err.field, err.expected)


def read_rows(
    stream: pa.NativeFile, block: Block, parse: Parse, wanted: Collection[int], all_good: bool
) -> dict[int, Row]:
    """Some of the good rows of a block of an open .jsonl file, by their numbers among its good rows, from 0.

    `all_good`: every line of the block is a good row, as the survey found; then a row is found by counting lines, and
    the others are not parsed. Numbers that the block no longer holds are left out of the answer.
    """
    stream.seek(0)  # where `_lines` expects a file that is read from its start
    found: dict[int, Row] = {}
    number, last = 0, max(wanted, default=-1)
    for line, (offset, data) in enumerate(_lines(stream, block.start, block.stop), start=1):
        if number > last:
            break
        if all_good and number not in wanted:
            number += 1
            continue
        text = _line_text(offset, data)
        row = None if text is None else _row(block, offset, line, text, parse)
        if isinstance(row, Row):
            if number in wanted:
                found[number] = row
            number += 1
        elif all_good:
            break  # the file is not what it was
    return found


def _elements(file: SourceFile, block: Block) -> Iterator[Element]:
    with open_stream(file) as stream:
        if file.kind == "parquet":
            yield from _parquet_elements(stream, block)
        elif file.kind == "array":
            for number, text in array_elements(stream):
                yield number, _escaped_utf8(text) if isinstance(text, str) else text
        elif file.kind == "jsonl":
            for offset, data in _lines(stream, block.start, block.stop):
                yield offset, _line_text(offset, data)
        else:
            yield from _compressed_elements(stream, file.kind)


def _lines(stream: pa.NativeFile, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes without the line feed) of the lines that begin in [start, stop)."""
    position = max(start - 1, 0)  # a line begins at `start` exactly where the byte before it is a line feed
    if position:
        stream.seek(position)
    offset, parts, skipping = position, [b""], start > 0
    while data := stream.read(min(BUFFER, max(stop - position, 0) + TAIL)):
        position += len(data)
        pieces = data.split(b"\n")
        if skipping and len(pieces) == 1:
            continue  # still inside a line that an earlier block owns
        if skipping:
            offset = position - len(data) + len(pieces.pop(0)) + 1
            skipping = False
        parts.append(pieces[0])  # joined once, so that a line of many buffers costs its length only
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
        yield offset, _damaged(kind, err)


def _parquet_elements(stream: pa.NativeFile, block: Block) -> Iterator[Element]:
    number = 0
    try:
        table = pq.ParquetFile(stream)
        number = sum(table.metadata.row_group(group).num_rows for group in range(block.start))
        for batch in table.iter_batches(batch_size=1024, row_groups=list(range(block.start, block.stop))):
            try:
                rows: list[Any] = batch.to_pylist()
            except (ValueError, OverflowError):  # one bad value would hide the other rows
                rows = [_one_row(batch, at) for at in range(batch.num_rows)]
            for raw in rows:
                yield number, raw if isinstance(raw, RowError) else _json_text(raw)
                number += 1
    except (OSError, pa.ArrowException) as err:
        yield number, _damaged("Parquet", err)


def _damaged(kind: str, err: Exception) -> RowError:
    """pyarrow's word for a file that is cut short or damaged."""
    return RowError("", f"must be part of a whole {kind} file, found damage at or after this row ({first_line(err)})")


def _one_row(batch: pa.RecordBatch, at: int) -> dict[str, Any] | RowError:
    try:
        return batch.slice(at, 1).to_pylist()[0]
    except UnicodeDecodeError as err:
        return RowError("", f"must be UTF-8 text, found byte 0x{err.object[err.start]:02x}")
    except (ValueError, OverflowError) as err:  # a date beyond Python's
        return RowError("", f"must hold what JSON can say ({first_line(err)})")


def _json_text(raw: dict[str, Any]) -> str | RowError:
    try:
        return json.dumps(raw, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError as err:
        return RowError("", f"must hold what JSON can say ({err})")


def _plain(value: object) -> str:
    """Parquet types that JSON lacks: bytes as base64, dates and decimals as they are written."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


# ---- JSON --------------------------------------------------------------------------------------------------


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_JSON = json.JSONDecoder(parse_constant=_no_constant)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BLANK = re.compile(r"[ \t\r\n]*")


def _object(text: str) -> dict[str, Any]:
    not_json = "must be a JSON object, found text that is not JSON"
    try:
        raw = _JSON.decode(text)
    except json.JSONDecodeError as err:
        raise RowError("", f"{not_json} ({err.msg}, column {err.colno})") from err
    except (ValueError, RecursionError) as err:
        # NaN, a number of thousands of digits, brackets nested too deep
        raise RowError("", f"{not_json} ({err})") from err
    if not isinstance(raw, dict):
        names = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}
        raise RowError("", f"must be a JSON object, found {names.get(type(raw), 'a number')}")
    # An escaped half of a surrogate pair is JSON, but no text: it cannot be written again. Most rows hold no
    # backslash at all, and one character is found far sooner than a pattern.
    if "\\" in text and _SURROGATE.search(text):
        for field, value in raw.items():
            if isinstance(_escaped_utf8(json.dumps([field, value], ensure_ascii=False)), RowError):
                found = "must be text, found half of a surrogate pair (\\ud800 to \\udfff)"
                raise RowError(_shown_field(field), found)
    return raw


def _shown_field(field: str) -> str:
    return field.encode(errors="backslashreplace").decode()


def _escaped_utf8(text: str) -> str | RowError:
    """The text, or what is wrong with it where it holds a lone surrogate: how array_elements marks a byte
    that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as err:
        return RowError("", f"must be UTF-8 text, found byte 0x{ord(text[err.start]) & 0xFF:02x}")
    return text


class _Window:
    """A sliding piece of a long JSON text: `text` from `at` on is what has not been used yet."""

    def __init__(self, stream: pa.NativeFile):
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.text = ""
        self.at = 0

    def fill(self) -> bool:
        """Drop what is used and read on, twice as much each time that nothing was used; False at the end."""
        self.text, self.at = self.text[self.at :], 0
        data = self.stream.read(max(BUFFER, len(self.text)))
        self.text += self.decoder.decode(data, final=not data)
        return bool(data)

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            self.at = _after_space(self.text, self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.fill():
                return ""

    def element(self) -> str | RowError:
        """The next JSON value's text on one line. Only with the mark after it in sight is a value known to be
        whole.
        """
        self.peek()
        wrong = ""
        while True:
            try:
                _, end = _JSON.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as err:
                wrong = getattr(err, "msg", str(err))
            else:
                after = _after_space(self.text, end)
                mark = self.text[after : after + 1]
                if mark and mark in ",]":
                    found, self.at = self.text[self.at : end], end
                    return found.replace("\n", " ").replace("\r", " ")
                wrong = "the array is not closed"
                if mark and (mark not in ".eE" or len(self.text) - after > 2):  # else a number that goes on
                    break
            if len(self.text) - self.at > LONGEST_ELEMENT or not self.fill():
                break
        return RowError("", f"must be a JSON object in a whole JSON array, found text that is not JSON ({wrong})")


def _after_space(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def array_elements(stream: pa.NativeFile) -> Iterator[tuple[int, str | RowError]]:
    """(number, JSON text on one line) of each element of a JSON array, streamed; bytes that are not UTF-8
    come as lone surrogates. An error is the last thing given: there is no way to find the next element.
    """
    window = _Window(stream)
    window.peek()
    window.at += 1
    number = 0
    if window.peek() == "]":
        window.at += 1
    else:
        mark = ","
        while mark == ",":
            text = window.element()
            yield number, text
            if isinstance(text, RowError):
                return
            number += 1
            mark = window.peek()
            window.at += 1
    if window.peek():
        yield number, RowError("", 'must not be there: text follows the closing "]"')
