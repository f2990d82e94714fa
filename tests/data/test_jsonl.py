"""Reading: whatever the cut and the packing, the rows are those of a plain loop over the file's lines."""

import json
import math
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import CONTENTS, PACKED, PLAIN, ROWS, anything, plain_loop, put, read_all

from raybge.data import jsonl
from raybge.data.jsonl import BadRow, Block, Row, RowError, cut, list_files, read_block, read_rows
from raybge.data.source_files import open_stream
from raybge.data.transcode import transcode
from raybge.util.errors import UserError


def whole(path: Path, block_bytes: int = 1 << 20) -> list[dict]:
    rows = [row for block in read_all(list_files(str(path), "--f"), block_bytes) for row in block]
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.raw for row in rows if isinstance(row, Row)]


@pytest.mark.parametrize("buffers", [(4 << 20, 64 << 10), (7, 5), (64, 1)], ids=["as shipped", "tiny", "small"])
@pytest.mark.parametrize("content", CONTENTS)
def test_every_cut_gives_the_rows_of_a_plain_loop(
    content: str, buffers: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "BUFFER", buffers[0])
    monkeypatch.setattr(jsonl, "TAIL", buffers[1])
    data = CONTENTS[content]
    files = list_files(str(put(tmp_path / "a.jsonl", data)), "--f")
    expected = [(offset, raw) for offset, _, raw in plain_loop(data)]
    sizes = [1, 2, 3, 17, 64, 100, 333, len(data) - 1, len(data), len(data) + 1]
    for block_bytes in sizes if len(data) < 4000 else sizes[3:]:
        blocks = cut(files, block_bytes)
        assert len(blocks) == math.ceil(len(data) / block_bytes)
        read = [list(read_block(files, block, anything)) for block in blocks]
        rows = [row for block in read for row in block]
        assert [(row.offset, row.raw) for row in rows if isinstance(row, Row)] == expected
        for block, found in zip(blocks, read, strict=True):
            assert all(block.start <= row.offset < block.stop for row in found)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    lines=st.lists(st.one_of(st.just(b""), st.text(max_size=12).map(lambda text: json.dumps({"t": text}).encode()))),
    ends=st.lists(st.sampled_from([b"\n", b"\r\n"]), min_size=1),
    last=st.booleans(),
    block_bytes=st.integers(1, 40),
    buffer=st.integers(1, 40),
)
def test_any_content_and_any_cut(
    lines: list[bytes], ends: list[bytes], last: bool, block_bytes: int, buffer: int, tmp_path_factory: Any
) -> None:
    data = b"".join(line + ends[at % len(ends)] for at, line in enumerate(lines))
    data = (data if last else data.rstrip(b"\r\n")) or b"{}"
    path = put(tmp_path_factory.getbasetemp() / "any.jsonl", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "BUFFER", buffer)
        patch.setattr(jsonl, "TAIL", 3)
        read = read_all(list_files(str(path), "--f"), block_bytes)
    found = [(row.offset, row.raw) for block in read for row in block if isinstance(row, Row)]
    assert found == [(offset, raw) for offset, _, raw in plain_loop(data)]


def test_an_offset_leads_back_to_its_row(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", CONTENTS["blank lines"])
    files = list_files(str(path), "--f")
    with path.open("rb") as stream:
        for row in (row for block in read_all(files, 50) for row in block):
            stream.seek(row.offset)
            assert isinstance(row, Row) and json.loads(stream.readline()) == row.raw


def test_lines_are_counted_within_the_block(tmp_path: Path) -> None:
    data = CONTENTS["blank lines"]
    files = list_files(str(put(tmp_path / "a.jsonl", data)), "--f")
    (rows,) = read_all(files, len(data))
    assert [row.line for row in rows] == [line for _, line, _ in plain_loop(data)]
    first, second = read_all(files, rows[2].offset)
    assert [row.line for row in first + second] == [
        rows[0].line,
        rows[1].line,
        1,
        rows[3].line - rows[2].line + 1,
    ]


@pytest.mark.parametrize("buffer", [4 << 20, 1, 13])
@pytest.mark.parametrize("packing", PACKED)
def test_a_packed_file_holds_the_rows_of_the_plain_one(
    packing: str, buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "BUFFER", buffer)
    path = PACKED[packing](tmp_path)
    assert whole(path, 100) == ROWS
    (file,) = list_files(str(path), "--f")
    (plain,) = transcode([file], str(tmp_path / "cache"))
    assert plain.name == file.name and plain.kind == "jsonl"
    again = [row.raw for block in read_all([plain], 100) for row in block if isinstance(row, Row)]
    assert again == ROWS


def test_offsets_in_packed_files(tmp_path: Path) -> None:
    offsets = [offset for offset, _, _ in plain_loop(PLAIN)]
    for packing, expected in {"gzip": offsets, "zstd": offsets, "array": [0, 1, 2, 3]}.items():
        ((*rows,),) = read_all(list_files(str(PACKED[packing](tmp_path)), "--f"), 10)
        assert [row.offset for row in rows] == expected


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
        "b": "AA==",
        "at": "2024-02-29 12:00:00",
        "x": 1.5,
    }
    assert isinstance(second, BadRow) and "must hold only values that JSON has" in second.expected


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"b\xe9d", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    ((*rows,),) = read_all(list_files(str(tmp_path), "--f"), 1 << 20)
    assert [type(row) for row in rows] == [Row, BadRow, Row]
    assert isinstance(rows[1], BadRow) and rows[1].expected == "must be UTF-8 text, found byte 0xe9"


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


def test_a_date_that_python_lacks_spoils_its_own_row_only(tmp_path: Path) -> None:
    days = pa.array([0, 2**31 - 1, 1], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"day": days}), tmp_path / "a.parquet")
    ((*rows,),) = read_all(list_files(str(tmp_path), "--f"), 1 << 20)
    assert [type(row) for row in rows] == [Row, BadRow, Row]


def test_what_looks_like_half_a_surrogate_pair_but_is_text(tmp_path: Path) -> None:
    data = rb'{"query": "\ud83d\ude42", "pos": "a path C:\\udata and \\uDC00"}'
    assert whole(put(tmp_path / "a.jsonl", data)) == [{"query": "🙂", "pos": "a path C:\\udata and \\uDC00"}]


def test_json_says_the_same_as_the_standard_library(tmp_path: Path) -> None:
    data = b'{"a": 1.0, "b": 1e3, "c": 123456789012345678901234567890, "d": "\\u00e9\\/", "a": 2}'
    assert whole(put(tmp_path / "a.jsonl", data)) == [json.loads(data)]


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('[{"t": 1}, {"t": }]', 1),
        ('[{"t": 1}, {"t": 2}', 1),  # without the mark after it, the second may go on
        ('[{"t": 1} {"t": 2}]', 0),
        ('[{"t": 1},]', 1),
        ('[{"t": 1}] [', 1),
        ("[", 0),
    ],
)
def test_a_broken_array(text: str, good: int, tmp_path: Path) -> None:
    ((*rows,),) = read_all(list_files(str(put(tmp_path / "a.json", text)), "--f"), 1 << 20)
    assert [type(row) for row in rows] == [Row] * good + [BadRow]


@pytest.mark.parametrize("number", ["0.5", "1e5", "1E+5", "-2.25e-10"])
@pytest.mark.parametrize("buffer", range(1, 9))
def test_a_number_in_an_array_ends_where_it_ends(
    number: str, buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not with what was read of the file: the rows behind it are good ones."""
    monkeypatch.setattr(jsonl, "BUFFER", buffer)
    path = put(tmp_path / "a.json", f'[{number}, {{"t": 1}}]')
    ((*rows,),) = read_all(list_files(str(path), "--f"), 1 << 20)
    assert [type(row) for row in rows] == [BadRow, Row]


def test_a_broken_array_element_does_not_take_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "BUFFER", 10)
    monkeypatch.setattr(jsonl, "LONGEST_ELEMENT", 100)
    path = put(tmp_path / "a.json", '[{"t": "' + "x" * 10_000 + '"}]')
    sizes = []
    fill = jsonl._Window.fill

    def measured(window: Any) -> bool:
        more = fill(window)
        sizes.append(len(window.text))
        return more

    monkeypatch.setattr(jsonl._Window, "fill", measured)
    ((row,),) = read_all(list_files(str(path), "--f"), 1 << 20)
    assert isinstance(row, BadRow) and max(sizes) < 500


def test_blocks_and_errors_survive_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(RowError("pos", "must be there")))
    assert (error.field, error.expected) == ("pos", "must be there")
    assert pickle.loads(pickle.dumps(Block(1, 2, 3))) == Block(1, 2, 3)


# --- some rows of a block ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 100, 777, 1 << 20])
@pytest.mark.parametrize("content", CONTENTS)
def test_rows_by_number_are_those_of_the_whole_block(content: str, block_bytes: int, tmp_path: Path) -> None:
    """With and without knowing that every line is a good row; blocks in any order, from one open file."""
    files = list_files(str(put(tmp_path / "a.jsonl", CONTENTS[content])), "--f")
    with open_stream(files[0]) as stream:
        for block in reversed(cut(files, block_bytes)[:200]):
            rows = [row for row in read_block(files, block, anything) if isinstance(row, Row)]
            for wanted in ({0}, {1, 3}, set(range(0, len(rows), 2)), set(range(len(rows))), set()):
                expected = {at: rows[at] for at in wanted if at < len(rows)}
                assert read_rows(stream, block, anything, wanted, all_good=False) == expected
                if "blank" not in content:
                    assert read_rows(stream, block, anything, wanted, all_good=True) == expected


def test_rows_by_number_count_good_rows_only(tmp_path: Path) -> None:
    bad = b'{"t": 1}\n\nnot json\n{"t": 2}\n[]\n{"t": 3}\n'
    files = list_files(str(put(tmp_path / "a.jsonl", bad)), "--f")
    with open_stream(files[0]) as stream:
        found = read_rows(stream, Block(0, 0, len(bad)), anything, {0, 2}, all_good=False)
        assert {at: (row.raw["t"], row.line) for at, row in found.items()} == {0: (1, 1), 2: (3, 6)}
        # a file that has changed gives fewer rows than were asked for, and never others
        assert read_rows(stream, Block(0, 0, len(bad)), anything, {0, 2}, all_good=True).keys() == {0}


def test_rows_that_are_not_wanted_are_not_parsed(tmp_path: Path) -> None:
    files = list_files(str(put(tmp_path / "a.jsonl", b'{"t": 1}\n' * 50)), "--f")
    parsed: list[dict] = []

    def parse(raw: dict) -> dict:
        parsed.append(raw)
        return raw

    with open_stream(files[0]) as stream:
        read_rows(stream, Block(0, 0, files[0].size), parse, {7, 30}, all_good=True)
    assert len(parsed) == 2
