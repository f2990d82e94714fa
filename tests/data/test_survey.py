"""The survey: counts equal a plain loop's, invalid rows are named, the result is cached."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import CONTENTS, GOOD, anything, plain_loop, put

from raybge.data import jsonl
from raybge.data import survey as survey_module
from raybge.data.groups import parse_group
from raybge.data.jsonl import list_files, read_block
from raybge.data.survey import Survey, survey
from raybge.util.errors import UserError

NOT_JSON = "the row must be a JSON object, found text that is not JSON"


TEXTS = "must be a non-empty string or a list of them"


WAY_OUT = "correct these rows, or leave them out with --on_bad_rows skip"
BAD: list[tuple[bytes, str]] = [
    (b"{'query': 1}", f"{NOT_JSON} (Expecting property name enclosed in double quotes, column 2)"),
    (b'{"query": "q", "pos": "p"', f"{NOT_JSON} (Expecting ',' delimiter, column 26)"),
    (b'{"query": "q", "pos": "p"} {}', f"{NOT_JSON} (Extra data, column 28)"),
    (b'{"query": NaN, "pos": "p"}', '"query" must be a non-empty string, found null'),
    (b'{"query": "q", "pos": ["p", Infinity]}', f'"pos" {TEXTS}, found null as item 2 of 2'),
    (b"[" * 100_000, NOT_JSON),
    (b'["q", "p"]', "the row must be a JSON object, found a list"),
    (b"17", "the row must be a JSON object, found a number"),
    (b"null", "the row must be a JSON object, found null"),
    (b'"text"', "the row must be a JSON object, found a string"),
    (b'{"pos": "p"}', '"query" must be a non-empty string, but the row has no such field'),
    (b'{"query": "q"}', f'"pos" {TEXTS}, but the row has no such field'),
    (b'{"query": "q", "pos": 3}', f'"pos" {TEXTS}, found 3'),
    (b'{"query": "", "pos": "p"}', '"query" must be a non-empty string, found ""'),
    (
        b'{"query": "q", "pos": "p", "neg": ["n", " "]}',
        f'"neg" {TEXTS} (or be missing), found " " as item 2 of 2',
    ),
    (b'{"query": "caf\xe9", "pos": "p"}', "the row must be UTF-8 text, found byte 0xe9 at byte 15"),
    (b'{"query": "\xed\xa0\x80", "pos": "p"}', "the row must be UTF-8 text, found byte 0xed at byte 12"),
    (
        rb'{"query": "q", "pos": ["\ud83d"]}',
        '"pos" must be text, found half of a surrogate pair (\\ud800 to \\udfff)',
    ),
    (
        rb'{"query": "q", "pos": "p", "note": {"\uDC00": 1}}',
        '"note" must be text, found half of a surrogate pair',
    ),
]


@pytest.mark.parametrize("block_bytes", [1, 30, 1 << 20])
@pytest.mark.parametrize("bad", BAD, ids=[says[:70] for _, says in BAD])
def test_a_bad_row_is_named(bad: tuple[bytes, str], block_bytes: int, tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", GOOD * 3)
    put(tmp_path / "b.jsonl", GOOD + b"\n" + GOOD + bad[0] + b"\n" + GOOD)
    files = list_files(str(tmp_path), "--f")
    block_bytes = max(block_bytes, len(bad[0]) // 100)
    with pytest.raises(UserError) as caught:
        survey(files, block_bytes, parse_group)
    assert str(caught.value).startswith(f"{tmp_path}/b.jsonl:4: {bad[1]}")
    assert str(caught.value).split("\n")[1:] == [WAY_OUT]

    skipped = survey(files, block_bytes, parse_group, on_bad_rows="skip")
    assert (skipped.total_rows, skipped.bad_count) == (6, 1)
    (row,) = skipped.bad
    assert (row.file, row.line, row.offset) == (1, 4, 2 * len(GOOD) + 1)


@pytest.mark.parametrize("mark", ["with a mark", "without"])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_file_in_utf_16_is_called_so(encoding: str, kind: str, mark: str, tmp_path: Path) -> None:
    """PowerShell's `>` and Notepad write UTF-16."""
    text = ("\ufeff" if mark == "with a mark" else "") + '{"query": "为什么", "pos": "p"}\r\n' * 3
    data = text.encode(encoding)
    path = put(tmp_path / f"a.{kind}", gzip.compress(data) if kind.endswith("gz") else data)
    name = encoding[:6].upper()
    advice = f"must be UTF-8 text, found {name}; convert the file: iconv -f {name} -t UTF-8"
    with pytest.raises(UserError) as caught:
        survey(list_files(str(path), "--f"), 1 << 20, parse_group)
    assert str(caught.value).split("\n")[:3] == [f"{path}:{line}: the row {advice}" for line in (1, 2, 3)]
    assert "--on_bad_rows" not in str(caught.value)  # nothing would be left


def test_characters_that_utf_8_lacks_are_not_called_utf_16(tmp_path: Path) -> None:
    rows = [b'{"query": "a\xff\xfe", "pos": "p"}', b'{"query": "\0", "pos": "p"}', b"\0\0\0\0"]
    with pytest.raises(UserError) as caught:
        survey(list_files(str(put(tmp_path / "a.jsonl", b"\n".join(rows))), "--f"), 1 << 20, parse_group)
    assert "UTF-16" not in str(caught.value) and "UTF-32" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut short", "not gzip"])
def test_a_damaged_gzip_file_is_a_bad_row_after_the_good_ones(damage: str, tmp_path: Path) -> None:
    data = gzip.compress(GOOD * 9)[:-8] if damage == "cut short" else GOOD
    files = list_files(str(put(tmp_path / "a.jsonl.gz", data)), "--f")
    with pytest.raises(UserError, match=r"a.jsonl.gz:\d+: the row must be part of a whole gzip file"):
        survey(files, 1 << 20, parse_group)


def test_an_empty_array_has_no_usable_row(tmp_path: Path) -> None:
    for name, data in [("a.json", b"[ ]"), ("b.jsonl", b"\n\n"), ("c.jsonl.gz", gzip.compress(b""))]:
        path = put(tmp_path / name, data)
        with pytest.raises(UserError, match=f"there is no usable row in .*{name}"):
            survey(list_files(str(path), "--f"), 1 << 20, parse_group)


@pytest.mark.parametrize("block_bytes", [1, 40, 777, 1 << 20])
def test_counts_equal_those_of_a_plain_loop(block_bytes: int, tmp_path: Path) -> None:
    contents = {
        "a.jsonl": CONTENTS["blank lines"],
        "b.jsonl": CONTENTS["crlf"],
        "c.jsonl": CONTENTS["no final newline"],
    }
    for name, data in contents.items():
        put(tmp_path / name, data)
    result = survey(list_files(str(tmp_path), "--f"), block_bytes, anything)
    assert result.rows.dtype == result.lines.dtype == np.int64
    assert len(result.rows) == len(result.lines) == len(result.blocks)
    for index, data in enumerate(contents.values()):
        mine = [at for at, block in enumerate(result.blocks) if block.file == index]
        assert result.rows[mine].sum() == len(plain_loop(data)) == 4
        assert result.lines[mine].sum() == len(data.splitlines())
    assert (result.total_rows, result.bad, result.bad_count) == (12, [], 0)


def test_the_place_of_a_line(tmp_path: Path) -> None:
    """Blank lines count, and each file has its own numbers."""
    for name in "ab":
        put(tmp_path / f"{name}.jsonl", f'\n{{"t": "{name}"}}\n\n' * 20)
    result = survey(list_files(str(tmp_path), "--f"), 25, anything)
    places = [
        result.place(block, row.line)
        for block in range(len(result.blocks))
        for row in read_block(result.files, result.blocks[block], anything)
    ]
    assert len(result.blocks) > 10
    assert places == [f"{tmp_path}/{name}.jsonl:{3 * number + 2}" for name in "ab" for number in range(20)]


def test_many_bad_rows(tmp_path: Path) -> None:
    files = list_files(str(put(tmp_path / "a.jsonl", GOOD + b'{"query": "q", "pos": 3}\n' * 2500)), "--f")
    with pytest.raises(UserError) as caught:
        survey(files, 1 << 20, parse_group)
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[0] for line in lines[:10]] == [f"{tmp_path}/a.jsonl:{line}" for line in range(2, 12)]
    assert lines[10:] == ["and 2,490 more", WAY_OUT]
    with pytest.raises(UserError, match="\nand at least 1,0.. more\n"):  # large data is not read to its end
        survey(files, 1000, parse_group)
    result = survey(files, 1000, parse_group, on_bad_rows="skip")
    assert (result.total_rows, result.bad_count) == (1, 2500)
    assert [bad.line for bad in result.bad] == list(range(2, 1002))
    files = list_files(str(put(tmp_path / "a.jsonl", b"3\n" * 12)), "--f")
    with pytest.raises(UserError) as caught:
        survey(files, 1000, parse_group, on_bad_rows="skip")
    assert str(caught.value).startswith("there is no usable row in ") and str(caught.value).endswith("and 2 more")


def test_the_cache_follows_files_and_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "a.jsonl", GOOD * 5 + b"3\n")
    cache = str(tmp_path / "cache")
    scans = []

    def counted(*each: Any) -> Any:
        scans.append(1)
        return jsonl.scan(*each)

    monkeypatch.setattr(survey_module, "scan", counted)

    def look(parse: Callable = parse_group, block_bytes: int = 1 << 20) -> tuple[Survey, bool]:
        scans.clear()
        files = list_files(str(path), "--f")
        return survey(files, block_bytes, parse, on_bad_rows="skip", cache_dir=cache), bool(scans)

    first, read = look()
    again, read_again = look()
    assert read and not read_again
    assert (again.rows.tolist(), again.lines.tolist(), again.bad) == ([5], [6], first.bad)
    assert (again.blocks, again.files, again.bad_count) == (first.blocks, first.files, 1)
    assert look(block_bytes=20)[1]  # another cut
    assert look(parse=anything)[1]  # another parse
    assert look(parse=lambda raw: raw)[1] and look(parse=lambda raw: raw)[1]  # functions without a name are not cached
    assert not look()[1]
    with pytest.raises(UserError, match="a.jsonl:6"):  # the result of "skip" is not used for "stop"
        survey(list_files(str(path), "--f"), 1 << 20, parse_group, cache_dir=cache)
    os.utime(path, ns=(5, 5))  # another time
    assert look()[1]
    put(path, GOOD * 6)
    os.utime(path, ns=(5, 5))  # another size
    changed, read = look()
    assert read and changed.total_rows == 6
    for name in os.listdir(cache):
        put(Path(cache) / name, b'{"rows": [')
    assert look()[1] and not look()[1]  # a truncated cache file is ignored and replaced


def test_parse_errors_of_other_kinds_are_not_hidden(tmp_path: Path) -> None:
    def broken(raw: dict) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        survey(list_files(str(put(tmp_path / "a.jsonl", GOOD)), "--f"), 1 << 20, broken)
