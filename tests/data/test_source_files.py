"""Input files of paths, folders, globs and URIs."""

import json
import re
from pathlib import Path

import pytest
from samples import PLAIN, ROWS, put, read_all

from raybge.data.jsonl import Row
from raybge.data.source_files import list_files
from raybge.util.errors import UserError
from raybge.util.filesystem import append_to_path, is_local


def test_folders_globs_and_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "b.jsonl",
        "a.jsonl",
        "sub/c.json",
        "sub/deep/d.jsonl",
        "sub/.hidden/e.jsonl",
        ".f.jsonl",
        "g h.jsonl",
    ):
        put(tmp_path / "d" / name, PLAIN)
    put(tmp_path / "d" / "README.md", "not data")
    monkeypatch.chdir(tmp_path)

    def names(paths: str | list[str]) -> list[str]:
        return [file.name for file in list_files(paths, "--f")]

    everything = ["a.jsonl", "b.jsonl", "g h.jsonl", "sub/c.json", "sub/deep/d.jsonl"]
    assert names("d") == names("d/") == [f"d/{name}" for name in everything]
    assert names("d/*.jsonl") == ["d/a.jsonl", "d/b.jsonl", "d/g h.jsonl"]
    assert names("d/?.jsonl") == names("d/[ab].jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert names("d/**/*.jsonl") == ["d/a.jsonl", "d/b.jsonl", "d/g h.jsonl", "d/sub/deep/d.jsonl"]
    assert names("d/*") == [f"d/{name}" for name in everything]
    assert names(f"{tmp_path}/*/sub/*.json") == [f"{tmp_path}/d/sub/c.json"]
    assert names(["d/b.jsonl", "d/a.jsonl"]) == ["d/b.jsonl", "d/a.jsonl"]  # a given order stays
    assert names(f"file://{tmp_path}/d") == [f"file://{tmp_path}/d/{name}" for name in everything]
    assert names(f"file://{tmp_path}/d/*.jsonl")[:2] == [f"file://{tmp_path}/d/{name}.jsonl" for name in "ab"]
    put(tmp_path / "d" / "x[1].jsonl", PLAIN)
    assert names("d/x[1].jsonl") == ["d/x[1].jsonl"]

    # the folder that was named, if one was, goes with each file
    assert {file.folder for file in list_files("d/", "--f")} == {"d/"}
    assert [file.folder for file in list_files(["d/sub", "d/a.jsonl", "d/*.jsonl"], "--f")][:3] == ["d/sub"] * 2 + [""]
    assert {file.folder for file in list_files("d/s*", "--f")} == {"d/sub"}

    files = list_files(["d", f"file://{tmp_path}/d"], "--f")
    monkeypatch.chdir("/")  # a worker's folder is another one
    assert [[row.raw for row in block if isinstance(row, Row)] for block in read_all(files, 1 << 20)] == [ROWS] * 12


def test_an_appended_part_precedes_the_query_of_a_uri() -> None:
    assert append_to_path("s3://bucket/a/?region=eu&scheme=http", "/mine") == "s3://bucket/a/mine?region=eu&scheme=http"
    assert append_to_path("s3://bucket/out.jsonl", ".work") == "s3://bucket/out.jsonl.work"
    assert append_to_path("/data/what?/", "/mine") == "/data/what?/mine"  # in a path it is a letter like others


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nowhere.jsonl", "--train_data: nowhere.jsonl: no such file or folder"),
        ("nowhere/*.jsonl", "--train_data: nowhere/*.jsonl: no such file or folder"),
        ("d/*.parquet", "--train_data: d/*.parquet: no such file or folder"),
        ("d/*.md", "--train_data: d/*.md matches no file that ends in one of .jsonl"),
        ("d/README.md", "--train_data: d/README.md must end in one of .jsonl"),
        ("hollow", "--train_data: the folder hollow holds no file that ends in one of .jsonl"),
        ("empty.jsonl", "--train_data: empty.jsonl is an empty file"),
        ("nope://x/y", "--train_data: nope://x/y cannot be opened"),
        ([], "--train_data: no path was given"),
    ],
)
def test_paths_without_files(path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "d" / "README.md", "x")
    put(tmp_path / "empty.jsonl", "")
    (tmp_path / "hollow").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        list_files(path, "--train_data")
    assert str(caught.value).startswith(says)


def test_local_uris():
    assert is_local("/a/b", "--f") and is_local("a", "--f") and is_local("file:///a", "--f")
    assert not is_local("fsspec+memory://a", "--f")
    for unknown in ("nonsense://a", "fsspec+nonsense://a"):
        with pytest.raises(UserError, match=f"--f: {re.escape(unknown)} cannot be opened .*nonsense"):
            is_local(unknown, "--f")


def test_files_that_raybge_writes_beside_its_results_are_no_data(tmp_path: Path) -> None:
    put(tmp_path / "d" / "mined.jsonl", PLAIN)
    metrics = json.dumps({"nDCG@10": 0.5, "queries": 3}, indent=2) + "\n"
    for name, content in {
        "mined.jsonl.meta.json": '{"pos": 1}',
        "mined.jsonl.report.html": "<html>",
        "metrics.json": metrics,
        "metrics.json.report.html": "<html>",
        "sub/train_results.json": metrics,
        "mined.jsonl.work/part.jsonl": PLAIN,
        ".raybge/data/x.jsonl": PLAIN,
        ".mined.jsonl.part": PLAIN,
        "_temporary/0/part.jsonl": PLAIN,  # of Spark
    }.items():
        put(tmp_path / "d" / name, content)
    (tmp_path / "d" / "copy").mkdir()
    for path in ("d", "d/*", "d/**/*", "d/mined*"):
        assert [file.name for file in list_files(f"{tmp_path}/{path}", "--f")] == [f"{tmp_path}/d/mined.jsonl"]
    # named one by one, each is what the person says it is
    assert list_files(f"{tmp_path}/d/mined.jsonl.meta.json", "--f")


@pytest.mark.parametrize(
    "content",
    [
        '{"query": "q", "pos": "p"}',  # JSON lines
        '[\n  {"query": "q", "pos": "p"}\n]',
        '{\n  "query": "q",\n  "pos": "p"\n}',  # one row over several lines: named as a bad row
        '{\n  "nDCG@10": 1\n}\n{\n  "nDCG@10": 1\n}',
        "{\n broken",
    ],
)
def test_other_json_files_of_a_folder_are_data(tmp_path: Path, content: str) -> None:
    put(tmp_path / "d" / "a.json", content)
    assert len(list_files(str(tmp_path / "d"), "--f")) == 1
