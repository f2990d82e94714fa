"""The reader on arbitrary bytes: rows equal those of a plain loop by the standard library, errors are named."""

import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from inputs import share, tried

from raybge.data import json_array, jsonl
from raybge.data.jsonl import Block, Row, cut, read_block
from raybge.data.source_files import list_files
from raybge.data.survey import survey
from raybge.data.transcode import transcode
from raybge.util.errors import UserError

FOLDER = tempfile.TemporaryDirectory(prefix="raybge-soak-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)

# --- the reference ----------------------------------------------------------------------------------------------------


def null(name: str) -> None:
    """Numbers that JSON lacks are read as null."""


def reference_row(text: bytes) -> dict | None:
    """Return the object by json.loads; None if it is none, or has text that UTF-8 cannot encode."""
    try:
        result = json.loads(text.decode("utf-8"), parse_constant=null)
        json.dumps(result, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) else None


def reference(data: bytes) -> list[tuple[int, int, dict | None]]:
    """Return (offset, line, object or None) of each line that is not blank."""
    result, offset = [], 0
    for line, whole in enumerate(data.split(b"\n"), start=1):
        text = whole[3:] if line == 1 and whole[:3] == b"\xef\xbb\xbf" else whole
        text = text.strip(b" \t\r")
        if text:
            result.append((offset, line, reference_row(text)))
        offset += len(whole) + 1
    return result


# --- inputs -----------------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
objects = st.dictionaries(st.text(max_size=4), values, max_size=3)
good = st.builds(
    lambda value, escaped, spaces: json.dumps(value, ensure_ascii=escaped).encode() + b" " * spaces,
    objects,
    st.booleans(),
    st.integers(0, 2),
)
ODD = [
    *(b"", b" ", b"\t\r", b"\0", b"{}", b"[]", b"null", b"1", b'"{}"', b"{", b"}", b"{}{}", b"{} x", b'{"a":1,}'),
    *(b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": 01}', b'{"a": "\t"}', b"{'a': 1}", b'{"a": 1'),
    *(rb'{"a": "\ud800"}', rb'{"a": "\ud83d\ude42"}', rb'{"\udc00": 1}', rb'{"a": "\\ud800"}', rb'{"a": "\x"}'),
    *(
        b"\xef\xbb\xbf{}",
        b"\xef\xbb\xbf",
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\xc0\x80"}',
        b"\xfe\xff",
    ),
    *(b'{"a": "\xe2\x80\xa8"}', b'{"a": "\x85"}', b"\x0b{}", b"\x0c{}", b"\x85{}", b"\xc2\xa0{}", b'{"a": 1, "a": 2}'),
    *(b'{"a": "\0"}', rb'{"a": "\u0000"}', b"\r", b"{}\r", b"\r\r"),
]
GIANT = [
    b'{"a": "' + b"x" * 70_000 + b'"}',
    b"x" * 70_000,
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": ' + b"9" * 4000 + b"}",
]
GIANT += [b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"]
kinds = st.sampled_from(["gz", "zst"])
columns = st.dictionaries(st.sampled_from("abc"), st.text(max_size=5), min_size=1)
lines = st.one_of(good, good, st.sampled_from(ODD), st.binary(max_size=12))


@st.composite
def contents(draw: Any) -> bytes:
    """Draw a file: lines with line ends, perhaps truncated or with a changed byte."""
    parts = draw(st.lists(lines, max_size=6))
    if draw(st.integers(0, 49)) == 0:
        parts.append(draw(st.sampled_from(GIANT)))
    ends = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r"]))
    data = (b"\xef\xbb\xbf" if draw(st.booleans()) else b"") + ends.join(parts)
    data += ends if draw(st.booleans()) else b""
    if data and draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + draw(st.binary(max_size=2)) + data[at + 1 :]
    return data or b"\n"


def anything(raw: dict) -> dict:
    return raw


def pack(data: bytes, kind: str) -> bytes:
    return gzip.compress(data) if kind == "gz" else pa.Codec("zstd").compress(data, asbytes=True)


def put(name: str, data: bytes) -> Path:
    path = Path(FOLDER.name) / name
    path.write_bytes(data)
    return path


def read(path: Path, blocks: list[Block] | None = None, block_bytes: int = 1 << 20) -> list:
    result = list_files(str(path), "--f")
    return [row for block in blocks or cut(result, block_bytes) for row in read_block(result, block, anything)]


def shown(rows: list) -> list:
    return [(row.offset, row.raw if isinstance(row, Row) else None) for row in rows]


def size_buffers(data: bytes, buffer: int) -> None:
    """Use small buffers, so that small files cross their ends."""
    small = len(data) < 300
    jsonl.BUFFER, jsonl.TAIL = (buffer, 5) if small else (1 << 22, 64 << 10)
    json_array.BUFFER = jsonl.BUFFER


@pytest.fixture(autouse=True)
def buffers(monkeypatch):
    """Restore the buffers after the test."""
    monkeypatch.setattr(jsonl, "TAIL", jsonl.TAIL)
    monkeypatch.setattr(jsonl, "BUFFER", jsonl.BUFFER)
    monkeypatch.setattr(json_array, "BUFFER", json_array.BUFFER)


# --- properties -------------------------------------------------------------------------------------------------------


@share(30)
@given(data=contents(), block_bytes=st.sampled_from([1, 2, 3, 7, 64, 1 << 20]), buffer=st.sampled_from([1, 7, 1 << 22]))
def test_lines(data, block_bytes, buffer):
    with tried("files of lines, cut into blocks"):
        size_buffers(data, buffer)
        block_bytes = block_bytes if len(data) < 400 else max(block_bytes, len(data) // 50)
        rows = read(put("a.jsonl", data), block_bytes=block_bytes)
        assert shown(rows) == [(offset, raw) for offset, _, raw in reference(data)]


@share(4)
@given(data=contents())
def test_a_boundary_at_every_byte(data):
    with tried("files of lines, a boundary at each byte"):
        path, data = put("a.jsonl", data[:150]), data[:150]
        expected = [(offset, raw) for offset, _, raw in reference(data)]
        for at in range(1, len(data)):
            assert shown(read(path, [Block(0, 0, at), Block(0, at, len(data))])) == expected


@share(10)
@given(data=contents(), block_bytes=st.sampled_from([2, 16, 1 << 20]), skip=st.booleans())
def test_survey(data, block_bytes, skip):
    """All rows are counted, or the first invalid one is named by file and line."""
    with tried("files that are surveyed"):
        size_buffers(data, 7)
        block_bytes = max(block_bytes, len(data) // 50)
        expected = reference(data)
        wrong = [line for _, line, raw in expected if raw is None]
        rows = len(expected) - len(wrong)
        path = put("a.jsonl", data)
        try:
            result = survey(list_files(str(path), "--f"), block_bytes, anything, "skip" if skip else "stop")
        except UserError as error:
            assert (wrong and not skip) or not rows
            assert not wrong or f"{path}:{wrong[0]}: " in str(error)
            assert str(path) in str(error)
        else:
            assert result.total_rows == rows and result.bad_count == len(wrong) and (skip or not wrong)
            assert [bad.line for bad in result.bad] == wrong


@share(8)
@given(
    data=contents(),
    kind=st.sampled_from(["gz", "zst"]),
    keep=st.floats(0, 1),
    whole=st.booleans(),
    buffer=st.integers(1, 40),
)
def test_packed(data, kind, keep, whole, buffer):
    """A whole file has the plain file's rows; a truncated one those before the cut, and an error."""
    with tried("packed files, whole and cut short"):
        size_buffers(data, buffer)
        packed = pack(data, kind)
        packed = packed if whole else packed[: max(1, int(len(packed) * keep))]
        path = put(f"a.jsonl.{kind}", packed)
        whole = whole or keep == 1
        expected = [(offset, raw) for offset, _, raw in reference(data)]
        rows = shown(read(path))
        if whole:
            assert rows == expected
            return
        good_rows = [row for row in rows if row[1] is not None]
        assert good_rows == [row for row in expected if row[1] is not None][: len(good_rows)]
        assert rows and rows[-1][1] is None
        with pytest.raises(UserError, match="not a whole|holds no rows"):
            transcode(list_files(str(path), "--f"), f"{FOLDER.name}/work")


@share(4)
@given(
    data=contents(),
    kind=st.sampled_from(["gz", "zst"]),
    at=st.floats(0, 1),
    bit=st.integers(0, 7),
    tail=st.binary(max_size=4),
)
def test_packed_and_damaged(data, kind, at, bit, tail):
    """gzip has a checksum: the content is equal. zstd's is optional: only errors that are named occur."""
    with tried("packed files, damaged"):
        packed = bytearray(pack(data, kind) + tail)
        packed[min(int(len(packed) * at), len(packed) - 1)] ^= 1 << bit
        path = put(f"b.jsonl.{kind}", bytes(packed))
        read(path)
        for old in Path(FOLDER.name, "work").glob("*"):
            old.unlink()
        try:
            (plain,) = transcode(list_files(str(path), "--f"), f"{FOLDER.name}/work")
        except UserError as error:
            assert str(path) in str(error)
        else:
            assert kind == "zst" or Path(plain.path).read_bytes() == data


@share(8)
@given(
    rows=st.lists(st.one_of(objects, values), max_size=5),
    indent=st.sampled_from([None, 0, 3]),
    escaped=st.booleans(),
    mark=st.sampled_from(["", "\ufeff", " \n"]),
    change=st.none() | st.tuples(st.floats(0, 1), st.binary(max_size=3)),
    buffer=st.sampled_from([1, 2, 13, 1 << 22]),
)
def test_arrays(rows, indent, escaped, mark, change, buffer):
    """Every element of a valid array is read; any other array has at least one invalid row."""
    with tried("arrays"):
        data = (mark + json.dumps(rows, indent=indent, ensure_ascii=escaped)).encode()
        if change:
            at = int(len(data) * change[0])
            data = data[:at] + change[1] + data[at + 1 :]
        size_buffers(data, buffer)
        path = put("a.json", data or b" ")
        result = list_files(str(path), "--f")
        read_rows = read(path)
        if result[0].kind == "jsonl":
            assert shown(read_rows) == [(offset, raw) for offset, _, raw in reference(data or b" ")]
            return
        try:
            array = json.loads(data.decode("utf-8-sig"), parse_constant=null)
            json.dumps(array, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            assert any(not isinstance(row, Row) for row in read_rows)
        else:
            expected = [each if isinstance(each, dict) else None for each in array]
            assert shown(read_rows) == [*enumerate(expected)]


@share(2)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from("abc"), st.text(max_size=5), min_size=1), min_size=1, max_size=9),
    data=st.data(),
)
def test_parquet(rows, data):
    """A whole file has its rows; one with changed bytes has rows, or an error that is named."""
    with tried("Parquet files, whole and damaged"):
        names = sorted({name for row in rows for name in row})
        table = pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names})
        path = Path(FOLDER.name) / "a.parquet"
        pq.write_table(table, path, row_group_size=4)
        if data.draw(st.booleans()):
            assert [row.raw for row in read(path, block_bytes=1)] == table.to_pylist()
            return
        packed = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(bytes(packed[: data.draw(st.sampled_from([len(packed), len(packed) // 2]))]) or b"x")
        try:
            read(path, block_bytes=1)
        except UserError as error:
            assert str(path) in str(error)
