"""Held-out split: every group on one side, reproducible by its seed, at least the requested share."""

import json
from pathlib import Path

import pytest

from raybge.data import survey as surveys
from raybge.data.groups import parse_group
from raybge.data.source_files import list_files
from raybge.data.survey import Survey
from raybge.tuning.held_out_split import split_held_out
from raybge.util.errors import UserError


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def make_survey(path: Path) -> Survey:
    return surveys.survey(list_files(str(path), "--train_data"), 4096, parse_group, "skip")


@pytest.fixture
def files(tmp_path):
    """Write 1,000 groups to two files: 500 queries in two spellings, and a line that is not a group."""
    rows = [{"query": f"query {i} é", "pos": [f"p {i}"], "neg": [f"n {i}"], "id": i} for i in range(500)]
    rows += [{"query": f"Query  {i} É", "pos": f"q {i}", "id": 500 + i} for i in range(500)]
    folder = tmp_path / "data"
    folder.mkdir()
    for name, part in (("a", rows[:300]), ("b", rows[300:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text + "no group\n", encoding="utf-8")
    return make_survey(folder), rows


def test_all_groups_of_a_query_are_on_one_side(files, tmp_path):
    survey, rows = files
    split = split_held_out(survey, 0.1, 7, tmp_path / "work")
    train, dev = lines(split.train), lines(split.dev)
    assert (len(train), len(dev)) == (split.trained, split.held_out)
    assert sorted(row["id"] for row in train + dev) == list(range(1000))
    assert {row["id"]: row for row in train + dev} == {row["id"]: row for row in rows}
    assert {row["id"] % 500 for row in dev}.isdisjoint(row["id"] % 500 for row in train)
    assert len(dev) == 100
    expected = [text for row in rows for text in [*([row["pos"]] if isinstance(row["pos"], str) else row["pos"])]]
    expected += [text for row in rows for text in row.get("neg", [])]
    assert sorted(row["text"] for row in lines(split.corpus)) == sorted(expected)


def test_split_depends_on_the_seed(files, tmp_path):
    survey, _ = files
    work = tmp_path / "work"
    first = lines(split_held_out(survey, 0.1, 7, work).dev)
    assert lines(split_held_out(survey, 0.1, 7, tmp_path / "other").dev) == first
    assert lines(split_held_out(survey, 0.1, 8, work).dev) != first
    assert len(lines(split_held_out(survey, 0.0001, 7, work).dev)) == 2  # at least one query
    assert len(list(work.iterdir())) == 3


def test_existing_split_is_reused(files, tmp_path, monkeypatch):
    survey, _ = files
    first = split_held_out(survey, 0.1, 7, tmp_path / "work")
    monkeypatch.setattr("raybge.tuning.held_out_split._write", None)
    assert split_held_out(survey, 0.1, 7, tmp_path / "work") == first


def test_split_without_training_groups_is_an_error(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text('{"query": "q", "pos": ["p"]}\n{"query": "Q", "pos": ["r"]}\n')
    with pytest.raises(UserError, match=r"--held_out 0.01 of 2 groups leaves nothing to train on; lower --held_out"):
        split_held_out(make_survey(path), 0.01, 1, tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())
