"""Plain copies of compressed files, arrays and Parquet: written once, complete, with invalid rows unchanged."""

import gzip
import os
from pathlib import Path
from typing import Any

import pytest
from samples import PACKED, PLAIN, put, read_all

from raybge.data import transcode as transcode_module
from raybge.data.jsonl import BadRow, Row, list_files
from raybge.data.transcode import transcode
from raybge.util.errors import UserError


def test_transcode_writes_once_and_whole(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    paths = [PACKED[packing](tmp_path / "in") for packing in ("gzip", "zstd", "array")]
    paths.append(put(tmp_path / "in" / "plain.jsonl", PLAIN))
    files = list_files([str(path) for path in paths], "--f")
    first = transcode(files, str(cache))
    assert first[3] == files[3]
    assert [Path(file.path).read_bytes() for file in first[:2]] == [PLAIN, PLAIN]
    for file in first[:3]:
        os.utime(file.path, ns=(1, 1))
    assert [file.mtime_ns for file in transcode(files, str(cache))[:3]] == [1, 1, 1]  # not written again
    put(paths[0], gzip.compress(PLAIN + b'{"query": 1}\n'))
    fresh = transcode(list_files([str(path) for path in paths], "--f"), str(cache))
    assert fresh[0].path != first[0].path and fresh[1].path == first[1].path

    damaged = put(tmp_path / "in" / "cut.jsonl.gz", gzip.compress(PLAIN)[:-9])
    with pytest.raises(UserError, match="cut.jsonl.gz is not a whole gzip file"):
        transcode(list_files(str(damaged), "--f"), str(cache))
    with pytest.raises(UserError, match=r"broken.json:2: the row must be a JSON object in a whole JSON array"):
        transcode(list_files(str(put(tmp_path / "broken.json", '[{"a": 1}, {"b": }]')), "--f"), str(cache))
    with pytest.raises(UserError, match="none.jsonl.gz holds no rows"):
        transcode(list_files(str(put(tmp_path / "none.jsonl.gz", gzip.compress(b""))), "--f"), str(cache))
    assert not [name for name in os.listdir(cache) if name.endswith(".tmp")]


def test_transcode_keeps_bad_rows_for_the_survey_to_name(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", b'[{"t": "ok"}, {"t": "b\xe9d"}, 7,\n {"t":\n "fine"}]')
    plain = transcode(list_files(str(path), "--f"), str(tmp_path / "cache"))
    packed = read_all(list_files(str(path), "--f"), 1 << 20)[0]
    for rows in (read_all(plain, 1 << 20)[0], packed):
        assert [(type(row), row.line) for row in rows] == [(Row, 1), (BadRow, 2), (BadRow, 3), (Row, 4)]
        assert [row.expected for row in rows if isinstance(row, BadRow)][1] == "must be a JSON object, found a number"


def test_transcode_on_ray(ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [PACKED[packing](tmp_path / "in") for packing in ("gzip", "zstd", "array")]
    files = list_files([str(path) for path in paths], "--f")
    here = transcode(files, str(tmp_path / "here"))
    monkeypatch.setattr(transcode_module, "IN_PROCESS_BYTES", 10)
    there = transcode(files, str(tmp_path / "there"))
    for one, other in zip(here, there, strict=True):
        assert Path(one.path).read_bytes() == Path(other.path).read_bytes()
    put(paths[0], gzip.compress(PLAIN)[:-9])
    with pytest.raises(UserError, match="a.jsonl.gz is not a whole gzip file") as caught:
        transcode(list_files(str(paths[0]), "--f"), str(tmp_path / "there"))
    assert type(caught.value) is UserError  # and not Ray's wrapper, whose message is a traceback
