"""Paths that not all nodes see are refused by flag, path and node; tests/multi_node has real nodes."""

import os
from pathlib import Path

import pytest

from raybge.cluster import shared_paths as shared
from raybge.cluster.resources import Cluster
from raybge.cluster.shared_paths import check_shared
from raybge.util.errors import UserError

TWO = Cluster(own=False, cpus=4, gpus=0, nodes=2, node_cpus=(2, 2), node_gpus=(0, 0))


@pytest.fixture
def other(monkeypatch, tmp_path):
    """Add a second node that sees nothing below tmp_path / "own", and an older old.jsonl."""

    def ask(paths):
        there = shared._sizes(paths)
        for i, path in enumerate(paths):
            if Path(path).is_relative_to(tmp_path / "own"):
                there[i] = None
            if path.endswith("old.jsonl"):
                there[i] = 1
        return [("10.0.0.1", shared._sizes(paths)), ("10.0.0.2", there)]

    monkeypatch.setattr(shared, "_ask_nodes", ask)
    (tmp_path / "own").mkdir()
    (tmp_path / "all").mkdir()
    (tmp_path / "own" / "data.jsonl").write_text("{}")
    (tmp_path / "all" / "old.jsonl").write_text("{}")


def test_a_folder_of_one_node_is_refused(other, tmp_path):
    place = tmp_path / "own" / "runs" / "mine"
    with pytest.raises(UserError, match=r"--output_dir .*own/runs/mine: 1 of 2 nodes do not see it \(10.0.0.2\); give"):
        check_shared(TWO, {"--output_dir": str(place)}, {})
    check_shared(TWO, {"--output_dir": str(tmp_path / "all" / "runs"), "--storage_path": None}, {})
    assert sorted(os.listdir(tmp_path / "all")) == ["old.jsonl"] and os.listdir(tmp_path / "own") == ["data.jsonl"]


def test_inputs_have_to_be_the_same_on_all_nodes(other, tmp_path):
    for name in ("own/data.jsonl", "all/old.jsonl"):
        with pytest.raises(UserError, match="--train_data .*: 1 of 2 nodes do not see it.*; put it into a folder"):
            check_shared(TWO, {}, {"--train_data": [str(tmp_path / name)]})


def test_uris_and_hub_names_pass(other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "own")
    check_shared(
        TWO, {"--output_file": "s3://bucket/x"}, {"--encoder": ["BAAI/bge", None], "--train_data": ["s3://b/c"]}
    )


def test_a_single_node_passes(other, tmp_path):
    alone = Cluster(own=True, cpus=2, gpus=0, nodes=1, node_cpus=(2,), node_gpus=(0,))
    check_shared(alone, {"--output_dir": str(tmp_path / "own")}, {"--train_data": [str(tmp_path / "own/data.jsonl")]})


def test_a_jobs_working_directory_is_refused():
    alone = Cluster(own=True, cpus=2, gpus=0, nodes=1, node_cpus=(2,), node_gpus=(0,))
    place = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs"
    with pytest.raises(UserError, match="--output_dir .* is deleted after the job: give an absolute path"):
        check_shared(alone, {"--output_dir": place}, {})


def test_many_nodes_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(shared, "_ask_nodes", lambda paths: [(f"10.0.0.{i}", [None] * len(paths)) for i in range(9)])
    with pytest.raises(UserError, match=r"9 of 9 nodes do not see it \(10.0.0.0, 10.0.0.1, 10.0.0.2 and 6 more\)"):
        check_shared(Cluster(False, 9, 0, 9, (1,) * 9, (0,) * 9), {"--output_dir": str(tmp_path)}, {})


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Path, "touch", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match="--output_dir: .* cannot be written"):
        check_shared(TWO, {"--output_dir": str(tmp_path / "x")}, {})
