"""Groups that are held out: each on one side, the same ones for one seed, and about as many as asked."""

import json
from pathlib import Path

import pytest

from raybge.data.groups import parse_group
from raybge.data.source_files import list_files
from raybge.data.survey import Survey, survey
from raybge.tuning.held_out_split import hold_out
from raybge.util.errors import UserError


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def surveyed(path: Path) -> Survey:
    return survey(list_files(str(path), "--train_data"), 4096, parse_group, "skip")


@pytest.fixture
def files(tmp_path):
    """1,000 groups in two files, 500 queries that come twice, in other letters; a line that is no group."""
    rows = [{"query": f"query {i} é", "pos": [f"p {i}"], "neg": [f"n {i}"], "id": i} for i in range(500)]
    rows += [{"query": f"Query  {i} É", "pos": f"q {i}", "id": 500 + i} for i in range(500)]
    folder = tmp_path / "data"
    folder.mkdir()
    for name, part in (("a", rows[:300]), ("b", rows[300:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text + "no group\n", encoding="utf-8")
    return surveyed(folder), rows


def test_every_group_is_on_one_side_with_all_rows_of_its_query(files, tmp_path):
    found, rows = files
    split = hold_out(found, 0.1, 7, tmp_path / "work")
    train, dev = lines(split.train), lines(split.dev)
    assert (len(train), len(dev)) == (split.trained, split.held_out)
    assert sorted(row["id"] for row in train + dev) == list(range(1000))
    assert {row["id"]: row for row in train + dev} == {row["id"]: row for row in rows}
    assert {row["id"] % 500 for row in dev}.isdisjoint(row["id"] % 500 for row in train)
    assert len(dev) == 100
    expected = [text for row in rows for text in [*([row["pos"]] if isinstance(row["pos"], str) else row["pos"])]]
    expected += [text for row in rows for text in row.get("neg", [])]
    assert sorted(row["text"] for row in lines(split.corpus)) == sorted(expected)


def test_the_sides_follow_from_the_seed(files, tmp_path):
    found, _ = files
    work = tmp_path / "work"
    first = lines(hold_out(found, 0.1, 7, work).dev)
    assert lines(hold_out(found, 0.1, 7, tmp_path / "other").dev) == first
    assert lines(hold_out(found, 0.1, 8, work).dev) != first
    assert len(lines(hold_out(found, 0.0001, 7, work).dev)) == 2  # one query at least
    assert len(list(work.iterdir())) == 3


def test_what_is_there_is_not_written_again(files, tmp_path, monkeypatch):
    found, _ = files
    first = hold_out(found, 0.1, 7, tmp_path / "work")
    monkeypatch.setattr("raybge.tuning.held_out_split._write", None)
    assert hold_out(found, 0.1, 7, tmp_path / "work") == first


def test_a_side_that_would_be_empty_is_said(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text('{"query": "q", "pos": ["p"]}\n{"query": "Q", "pos": ["r"]}\n')
    with pytest.raises(UserError, match=r"--held_out 0.01 of 2 groups leaves nothing to train on; give --eval_data"):
        hold_out(surveyed(path), 0.01, 1, tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())
