"""Parquet: rows as JSON, by row groups; damaged files and values without a JSON form are named."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import ROWS, put, read_all

from raybge.data.jsonl import BadRow, Row, cut, list_files
from raybge.data.transcode import transcode
from raybge.util.errors import UserError

UNREADABLE = "days=2147483647; must have magnitude <= 999999999"


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    expected = [{"neg": None, **row} for row in ROWS * 5]
    pq.write_table(pa.Table.from_pylist(expected), path, row_group_size=3)
    files = list_files(str(path), "--f")
    for block_bytes, blocks in [(1, 7), (1 << 20, 1)]:
        read = read_all(files, block_bytes)
        rows = [row for block in read for row in block if isinstance(row, Row)]
        assert len(read) == blocks
        assert [row.raw for row in rows] == expected
        assert [row.offset for row in rows] == list(range(20))


def test_parquet_values_that_json_lacks(tmp_path: Path) -> None:
    moment = np.datetime64("2024-02-29T12:00:00", "s")
    table = pa.table({"t": ["a", "b"], "b": [b"\x00", b"\xff"], "at": [moment, moment], "x": [1.5, math.nan]})
    pq.write_table(table, tmp_path / "a.parquet")
    ((first, second),) = read_all(list_files(str(tmp_path), "--f"), 1 << 20)
    assert isinstance(first, Row) and first.raw == {
        "t": "a",
        "b": "\0",
        "at": "2024-02-29 12:00:00",
        "x": 1.5,
    }
    assert isinstance(second, Row) and (second.raw["b"], second.raw["x"]) == ({"base64": "/w=="}, None)


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"b\xe9d", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    ((*rows,),) = read_all(list_files(str(tmp_path), "--f"), 1 << 20)
    assert [row.raw["text"] for row in rows] == ["good", {"base64": "Yulk"}, "fine"]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = put(tmp_path / "a.parquet", b"PAR1 not really")
    with pytest.raises(UserError, match="a.parquet is not a whole Parquet file"):
        cut(list_files(str(path), "--f"), 1 << 20)


def test_damage_inside_a_parquet_file_is_named(tmp_path: Path) -> None:
    """The footer is whole, so that only reading finds it."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"t": ["a" * 50, "b", "c"]}), path)
    packed = bytearray(path.read_bytes())
    packed[4:40] = b"\xff" * 36
    path.write_bytes(bytes(packed))
    files = list_files(str(path), "--f")
    ((row,),) = read_all(files, 1 << 20)
    assert isinstance(row, BadRow) and "found damage at or after this row" in row.expected
    with pytest.raises(UserError, match="a.parquet:1: the row must be part of a whole Parquet file"):
        transcode(files, str(tmp_path / "cache"), ["parquet"])
    path.write_bytes(bytes(packed[:-6]))
    with pytest.raises(UserError, match="a.parquet is not a whole Parquet file"):
        transcode(list_files(str(path), "--f"), str(tmp_path / "cache"), ["parquet"])


def test_a_date_that_python_lacks_changes_its_own_row_only(tmp_path: Path) -> None:
    days = pa.array([0, 2**31 - 1, 1], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"day": days}), tmp_path / "a.parquet")
    ((*rows,),) = read_all(list_files(str(tmp_path), "--f"), 1 << 20)
    assert [row.raw["day"] for row in rows] == ["1970-01-01", {"unreadable": UNREADABLE}, "1970-01-02"]
