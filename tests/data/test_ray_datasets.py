"""Rows as Ray datasets: one Ray block per Block, in order; the survey as Ray tasks."""

import gzip
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import GOOD, ROWS, lines_of, put

from raybge.data import ray_datasets as source
from raybge.data import survey as survey_module
from raybge.data.groups import parse_group
from raybge.data.jsonl import Row, RowError, list_files, read_block
from raybge.data.ray_datasets import batches_of, to_dataset
from raybge.data.survey import survey
from raybge.util.errors import UserError


def good_query(raw: dict) -> str:
    if raw.get("bad"):
        raise RowError("bad", "must be left out")
    return raw["query"]


def test_a_dataset_has_one_ray_block_per_block(ray_cluster: Any, tmp_path: Path) -> None:
    rows = [{**ROWS[at % 4], "n": at, "bad": at % 7 == 0} for at in range(300)]
    rows[150]["long"] = "x" * 3000  # several blocks in which no line begins
    rows[0] |= {"neg": None, "long": None}  # pyarrow takes the columns from the first row
    put(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines_of(rows, "\r\n\n"))
    put(tmp_path / "b.jsonl.gz", gzip.compress(lines_of(rows)))
    put(tmp_path / "c.json", json.dumps(rows, indent=1))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=64)
    files = list_files(str(tmp_path), "--f")
    counts = survey(files, 1000, good_query, on_bad_rows="skip")
    assert 0 in counts.rows.tolist()
    dataset = to_dataset(counts, good_query)
    assert dataset.count() == counts.total_rows == 4 * 257

    tables = [ray_cluster.get(ref) for bundle in dataset.iter_internal_ref_bundles() for ref in bundle.block_refs]
    seen: list[tuple] = []
    assert [table.num_rows for table in tables] == counts.rows.tolist()  # a Block, a Ray block, the empty ones too
    for index, table in enumerate(tables):
        assert table.schema.equals(source.SCHEMA, check_metadata=False)
        assert set(table["block"].to_pylist()) <= {index}
        seen += zip(*(table[name].to_pylist() for name in ("file", "offset", "json")), strict=True)
    expected = [
        (row.file, row.offset, row.raw)
        for block in counts.blocks
        for row in read_block(files, block, good_query)
        if isinstance(row, Row)
    ]
    assert [(file, offset, json.loads(text)) for file, offset, text in seen] == expected
    good = [row for row in rows if not row["bad"]]
    assert [{k: v for k, v in each[2].items() if v is not None} for each in expected] == [
        {k: v for k, v in row.items() if v is not None} for row in good * 4
    ]
    first = (tmp_path / "a.jsonl").read_bytes().splitlines()[2].decode()
    assert seen[0][2] == first  # the text itself, not written anew: 0.10 stays 0.10


def test_a_batch_is_a_block(ray_cluster: Any, tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", lines_of([{"query": str(at)} for at in range(200)]))
    counts = survey(list_files(str(tmp_path), "--f"), 333, good_query)

    def seen(batch: dict[str, np.ndarray]) -> dict[str, list]:
        return {"blocks": [sorted(set(batch["block"].tolist()))], "rows": [len(batch["json"])]}

    result = to_dataset(counts, good_query).map_batches(seen, batch_size=None).take_all()
    assert [row["blocks"] for row in result] == [[index] for index in range(len(counts.blocks))]
    assert [row["rows"] for row in result] == counts.rows.tolist()


def test_a_large_block_stays_whole(ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.data.DataContext.get_current(), "target_max_block_size", 10_000)
    put(tmp_path / "a.jsonl", lines_of([{"query": "x" * 1000}] * 200))
    counts = survey(list_files(str(tmp_path), "--f"), 100_000, good_query)
    tables: list[Any] = list(to_dataset(counts, good_query).iter_batches(batch_size=None, batch_format="pyarrow"))
    assert [table.num_rows for table in tables] == counts.rows.tolist() and len(tables) == 3


def test_a_file_that_changed_is_named(ray_cluster: Any, tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", GOOD * 4)
    counts = survey(list_files(str(path), "--f"), 1 << 20, good_query)
    put(path, GOOD * 2)
    with pytest.raises(Exception, match="a.jsonl changed during the run: a block had 4 rows and has 2 now"):
        to_dataset(counts, good_query).take_all()


def test_a_survey_by_ray_tasks_equals_one_in_the_process(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_ray_data_stops_with_an_interrupted_loop(ray_cluster: Any) -> None:
    dataset = ray_cluster.data.range(1000, override_num_blocks=50)

    def executors() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "StreamingExecutor" in thread.name]

    with pytest.raises(KeyboardInterrupt), batches_of(dataset) as batches:
        for _ in batches:
            assert executors()
            raise KeyboardInterrupt
    assert not executors()


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
