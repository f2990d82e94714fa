"""Reading: with any cut and compression, the rows equal those of a plain loop over the file's lines."""

import json
import math
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from samples import CONTENTS, PACKED, PLAIN, ROWS, anything, plain_loop, put, read_all

from raybge.data import json_array, jsonl
from raybge.data.jsonl import BadRow, Block, Row, RowError, cut, list_files, read_block, read_rows
from raybge.data.source_files import open_stream
from raybge.data.transcode import transcode


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
        for block, actual in zip(blocks, read, strict=True):
            assert all(block.start <= row.offset < block.stop for row in actual)


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
    actual = [(row.offset, row.raw) for block in read for row in block if isinstance(row, Row)]
    assert actual == [(offset, raw) for offset, _, raw in plain_loop(data)]


def test_an_offset_locates_its_row(tmp_path: Path) -> None:
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
def test_a_compressed_file_has_the_rows_of_the_plain_one(
    packing: str, buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (jsonl, json_array):
        monkeypatch.setattr(module, "BUFFER", buffer)
    path = PACKED[packing](tmp_path)
    assert whole(path, 100) == ROWS
    (file,) = list_files(str(path), "--f")
    (plain,) = transcode([file], str(tmp_path / "cache"))
    assert plain.name == file.name and plain.kind == "jsonl"
    again = [row.raw for block in read_all([plain], 100) for row in block if isinstance(row, Row)]
    assert again == ROWS


def test_offsets_in_compressed_files(tmp_path: Path) -> None:
    offsets = [offset for offset, _, _ in plain_loop(PLAIN)]
    for packing, expected in {"gzip": offsets, "zstd": offsets, "array": [0, 1, 2, 3]}.items():
        ((*rows,),) = read_all(list_files(str(PACKED[packing](tmp_path)), "--f"), 10)
        assert [row.offset for row in rows] == expected


def test_text_that_resembles_half_a_surrogate_pair(tmp_path: Path) -> None:
    data = rb'{"query": "\ud83d\ude42", "pos": "a path C:\\udata and \\uDC00"}'
    assert whole(put(tmp_path / "a.jsonl", data)) == [{"query": "🙂", "pos": "a path C:\\udata and \\uDC00"}]


def test_json_is_decoded_as_by_the_standard_library(tmp_path: Path) -> None:
    data = b'{"a": 1.0, "b": 1e3, "c": 123456789012345678901234567890, "d": "\\u00e9\\/"}'
    assert whole(put(tmp_path / "a.jsonl", data)) == [json.loads(data)]


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ('{"text": "a", "text": "b"}', "text"),
        ('{"text": "a", "_id": 1, "text": ["a"]}', "text"),
        ('{"text": "a", "te\\u0078t": "b"}', "text"),  # an escaped x
        ('{"text": "a", "text": null}', "text"),
        ('{"": 1, "": 2, "text": "a"}', ""),
        ('{"text": "a", "pos": [], "text": "a", "pos": ["b"]}', "pos"),
        ('{"text": "a", "text": "a"}', None),  # nothing is lost
        ('{"text": "a", "more": {"text": "b", "b": 1, "b": 2}, "Text": "c"}', None),  # no row has such a field twice
    ],
)
def test_a_key_with_two_values(row: str, key: str | None, tmp_path: Path) -> None:
    for name, content in (("a.jsonl", f'{{"t": 1}}\n{row}\n'), ("a.json", f'[{{"t": 1}}, {row}]')):
        ((_, second),) = read_all(list_files(str(put(tmp_path / name, content)), "--f"), 1 << 20)
        if key is None:
            assert isinstance(second, Row) and second.raw == json.loads(row)
        else:
            assert isinstance(second, BadRow) and (second.field, second.line) == (key, 2)
            assert second.expected.startswith("must occur once in a row")


@pytest.mark.parametrize("end", [" ", "\t", "\r"])
def test_white_space_around_a_row_is_no_part_of_it(end: str, tmp_path: Path) -> None:
    assert whole(put(tmp_path / "a.json", f'[{end}{{"t": {end}1}}{end},{end}{{"t": 2}}{end}]')) == [{"t": 1}, {"t": 2}]
    assert whole(put(tmp_path / "a.jsonl", f'{end}{{"t": 1}}{end}\n{{"t": 2}}{end}')) == [{"t": 1}, {"t": 2}]
    ((row,),) = read_all(list_files(str(put(tmp_path / "b.jsonl", f'{{"t": 1}}{end}}}')), "--f"), 1 << 20)
    assert isinstance(row, BadRow) and "Extra data, column 10" in row.expected


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
def test_a_number_at_a_buffer_end_is_read_completely(
    number: str, buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows after it are valid."""
    monkeypatch.setattr(json_array, "BUFFER", buffer)
    path = put(tmp_path / "a.json", f'[{number}, {{"t": 1}}]')
    ((*rows,),) = read_all(list_files(str(path), "--f"), 1 << 20)
    assert [type(row) for row in rows] == [BadRow, Row]


def test_a_broken_array_element_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "BUFFER", 10)
    monkeypatch.setattr(json_array, "LONGEST_ELEMENT", 100)
    path = put(tmp_path / "a.json", '[{"t": "' + "x" * 10_000 + '"}]')
    sizes = []
    fill = json_array._Window.fill

    def measured(window: Any) -> bool:
        more = fill(window)
        sizes.append(len(window.text))
        return more

    monkeypatch.setattr(json_array._Window, "fill", measured)
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
    """With and without all_good; blocks in any order, from one open file."""
    files = list_files(str(put(tmp_path / "a.jsonl", CONTENTS[content])), "--f")
    with open_stream(files[0]) as stream:
        for block in reversed(cut(files, block_bytes)[:200]):
            rows = [row for row in read_block(files, block, anything) if isinstance(row, Row)]
            for wanted in ({0}, {1, 3}, set(range(0, len(rows), 2)), set(range(len(rows))), set()):
                expected = {at: rows[at] for at in wanted if at < len(rows)}
                assert read_rows(stream, block, anything, wanted, all_good=False) == expected
                if "blank" not in content:
                    assert read_rows(stream, block, anything, wanted, all_good=True) == expected


def test_rows_by_number_count_valid_rows_only(tmp_path: Path) -> None:
    bad = b'{"t": 1}\n\nnot json\n{"t": 2}\n[]\n{"t": 3}\n'
    files = list_files(str(put(tmp_path / "a.jsonl", bad)), "--f")
    with open_stream(files[0]) as stream:
        actual = read_rows(stream, Block(0, 0, len(bad)), anything, {0, 2}, all_good=False)
        assert {at: (row.raw["t"], row.line) for at, row in actual.items()} == {0: (1, 1), 2: (3, 6)}
        # a changed file gives fewer rows, and never other ones
        assert read_rows(stream, Block(0, 0, len(bad)), anything, {0, 2}, all_good=True).keys() == {0}


def test_other_rows_are_not_parsed(tmp_path: Path) -> None:
    files = list_files(str(put(tmp_path / "a.jsonl", b'{"t": 1}\n' * 50)), "--f")
    parsed: list[dict] = []

    def parse(raw: dict) -> dict:
        parsed.append(raw)
        return raw

    with open_stream(files[0]) as stream:
        read_rows(stream, Block(0, 0, files[0].size), parse, {7, 30}, all_good=True)
    assert len(parsed) == 2
