"""Rows on Ray: one block a Block, in order; packed files made plain; the survey as Ray tasks."""

import gzip
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import GOOD, PACKED, PLAIN, ROWS, lines_of, put, read_all

from raybge.data import ray_datasets as source
from raybge.data import survey as survey_module
from raybge.data import transcode as transcode_module
from raybge.data.groups import parse_group
from raybge.data.jsonl import BadRow, Row, RowError, list_files, read_block
from raybge.data.ray_datasets import to_dataset
from raybge.data.survey import survey
from raybge.data.transcode import transcode
from raybge.util.errors import UserError


def test_transcode_writes_once_and_whole(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    made = [PACKED[packing](tmp_path / "in") for packing in ("gzip", "zstd", "array")]
    made.append(put(tmp_path / "in" / "plain.jsonl", PLAIN))
    files = list_files([str(path) for path in made], "--f")
    first = transcode(files, str(cache))
    assert first[3] == files[3]
    assert [Path(file.path).read_bytes() for file in first[:2]] == [PLAIN, PLAIN]
    for file in first[:3]:
        os.utime(file.path, ns=(1, 1))
    assert [file.mtime_ns for file in transcode(files, str(cache))[:3]] == [1, 1, 1]  # not written again
    put(made[0], gzip.compress(PLAIN + b'{"query": 1}\n'))
    fresh = transcode(list_files([str(path) for path in made], "--f"), str(cache))
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


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the workers find this file's functions
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
        ray.shutdown()


def good_query(raw: dict) -> str:
    if raw.get("bad"):
        raise RowError("bad", "must be left out")
    return raw["query"]


def test_dataset_has_one_block_a_block(ray_here: Any, tmp_path: Path) -> None:
    rows = [{**ROWS[at % 4], "n": at, "bad": at % 7 == 0} for at in range(300)]
    rows[150]["long"] = "x" * 3000  # several blocks in which no line begins
    rows[0] |= {"neg": None, "long": None}  # pyarrow takes the columns from the first row
    put(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines_of(rows, "\r\n\n"))
    put(tmp_path / "b.jsonl.gz", gzip.compress(lines_of(rows)))
    put(tmp_path / "c.json", json.dumps(rows, indent=1))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=64)
    files = list_files(str(tmp_path), "--f")
    found = survey(files, 1000, good_query, on_bad_rows="skip")
    assert 0 in found.rows.tolist()
    dataset = to_dataset(found, good_query)
    assert dataset.count() == found.total_rows == 4 * 257

    tables = [ray_here.get(ref) for bundle in dataset.iter_internal_ref_bundles() for ref in bundle.block_refs]
    seen: list[tuple] = []
    assert [table.num_rows for table in tables] == found.rows.tolist()  # a Block, a Ray block, the empty ones too
    for index, table in enumerate(tables):
        assert table.schema.equals(source.SCHEMA, check_metadata=False)
        assert set(table["block"].to_pylist()) <= {index}
        seen += zip(*(table[name].to_pylist() for name in ("file", "offset", "json")), strict=True)
    expected = [
        (row.file, row.offset, row.raw)
        for block in found.blocks
        for row in read_block(files, block, good_query)
        if isinstance(row, Row)
    ]
    assert [(file, offset, json.loads(text)) for file, offset, text in seen] == expected
    kept = [row for row in rows if not row["bad"]]
    assert [{k: v for k, v in each[2].items() if v is not None} for each in expected] == [
        {k: v for k, v in row.items() if v is not None} for row in kept * 4
    ]
    first = (tmp_path / "a.jsonl").read_bytes().splitlines()[2].decode()
    assert seen[0][2] == first  # the text itself, not written anew: 0.10 stays 0.10


def test_a_batch_is_a_block(ray_here: Any, tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", lines_of([{"query": str(at)} for at in range(200)]))
    found = survey(list_files(str(tmp_path), "--f"), 333, good_query)

    def seen(batch: dict[str, np.ndarray]) -> dict[str, list]:
        return {"blocks": [sorted(set(batch["block"].tolist()))], "rows": [len(batch["json"])]}

    result = to_dataset(found, good_query).map_batches(seen, batch_size=None).take_all()
    assert [row["blocks"] for row in result] == [[index] for index in range(len(found.blocks))]
    assert [row["rows"] for row in result] == found.rows.tolist()


def test_a_large_block_stays_whole(ray_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_here.data.DataContext.get_current(), "target_max_block_size", 10_000)
    put(tmp_path / "a.jsonl", lines_of([{"query": "x" * 1000}] * 200))
    found = survey(list_files(str(tmp_path), "--f"), 100_000, good_query)
    tables: list[Any] = list(to_dataset(found, good_query).iter_batches(batch_size=None, batch_format="pyarrow"))
    assert [table.num_rows for table in tables] == found.rows.tolist() and len(tables) == 3


def test_a_file_that_changed_is_named(ray_here: Any, tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", GOOD * 4)
    found = survey(list_files(str(path), "--f"), 1 << 20, good_query)
    put(path, GOOD * 2)
    with pytest.raises(Exception, match="a.jsonl changed while it was in use: a part that held 4 rows holds 2"):
        to_dataset(found, good_query).take_all()


def test_survey_on_ray_equals_survey_here(ray_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.jsonl", (GOOD * 3 + b'{"query": 1}\n\n') * 300)
    put(tmp_path / "b.jsonl.gz", gzip.compress(GOOD * 50))
    pq.write_table(pa.table({"query": ["q"] * 9, "pos": ["p"] * 9}), tmp_path / "c.parquet", row_group_size=2)
    files = list_files(str(tmp_path), "--f")
    here = survey(files, 1000, parse_group, on_bad_rows="skip")
    with pytest.raises(UserError) as said_here:
        survey(files, 1000, parse_group)

    monkeypatch.setattr(survey_module, "IN_PROCESS_BYTES", 3000)
    monkeypatch.setattr(survey_module, "_count", None)  # whatever counts now does so on a worker
    there = survey(files, 1000, parse_group, on_bad_rows="skip")
    assert there.rows.tolist() == here.rows.tolist() and there.lines.tolist() == here.lines.tolist()
    assert (there.bad, there.bad_count) == (here.bad, here.bad_count) and here.bad_count == 300
    with pytest.raises(UserError) as said_there:
        survey(files, 1000, parse_group)
    assert str(said_there.value) == str(said_here.value)

    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a.jsonl cannot be opened") as caught:
        survey(files, 1000, parse_group)
    assert type(caught.value) is UserError  # and not Ray's wrapper, whose message is a traceback


def test_transcode_on_ray(ray_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [PACKED[packing](tmp_path / "in") for packing in ("gzip", "zstd", "array")]
    files = list_files([str(path) for path in made], "--f")
    here = transcode(files, str(tmp_path / "here"))
    monkeypatch.setattr(transcode_module, "IN_PROCESS_BYTES", 10)
    there = transcode(files, str(tmp_path / "there"))
    for one, other in zip(here, there, strict=True):
        assert Path(one.path).read_bytes() == Path(other.path).read_bytes()
    put(made[0], gzip.compress(PLAIN)[:-9])
    with pytest.raises(UserError, match="a.jsonl.gz is not a whole gzip file") as caught:
        transcode(list_files(str(made[0]), "--f"), str(tmp_path / "there"))
    assert type(caught.value) is UserError  # and not Ray's wrapper, whose message is a traceback


def test_reading_imports_neither_ray_nor_torch(tmp_path: Path) -> None:
    import subprocess

    put(tmp_path / "a.jsonl", GOOD)
    code = (
        "import sys\nfrom raybge.data.source_files import list_files\nfrom raybge.data.survey import survey\n"
        "from raybge.data.transcode import transcode\nfrom raybge.data.groups import parse_group\n"
        f"files = transcode(list_files({str(tmp_path)!r}, '--f'), {str(tmp_path)!r})\n"
        "assert survey(files, 100, parse_group).total_rows == 1\n"
        "print([name for name in ('ray', 'torch', 'pandas') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
