"""Which checkpoint a run continues from, whether it may, and how a finished model takes its place."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from faulty import URI, Died, Life, Store, stored

from raybge.data.order import Order
from raybge.data.source_files import SourceFile
from raybge.data.survey import Survey
from raybge.training.checkpoint import manifest as checkpoints
from raybge.training.checkpoint.manifest import (
    Identity,
    check_writable,
    discard,
    finished,
    load,
    newest,
    publish,
    rotate,
    seal,
    starting_point,
)
from raybge.util import retry
from raybge.util.errors import UserError

SAME = Identity(data="d", global_batch=6, seed=1, gradient_accumulation_steps=1, order="o")


def written(storage: Path, step: int, whole: bool = True) -> Path:
    folder = storage / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights")
    if whole:
        seal(folder, step, 0, step, SAME)
    return folder


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    assert newest(tmp_path) is None
    written(tmp_path, 9)
    written(tmp_path, 10)
    written(tmp_path, 11, whole=False)
    (tmp_path / "checkpoint-best").mkdir()  # a person's own
    found = newest(tmp_path)
    assert (found.path, found.step, found.position, found.identity) == (str(tmp_path / "checkpoint-10"), 10, 10, SAME)


def test_rotating_keeps_the_last_and_the_best(tmp_path):
    folders = {step: written(tmp_path, step) for step in (2, 4, 6, 8)}
    written(tmp_path, 10, whole=False)  # of a run that was lost further on: it takes no one's place
    rotate(folders[8], None, None)
    assert all(folder.exists() for folder in folders.values())
    rotate(folders[8], 3, str(folders[2]))
    assert [step for step, folder in folders.items() if folder.exists()] == [2, 6, 8]
    rotate(folders[8], 1, str(folders[2]))
    assert [step for step, folder in folders.items() if folder.exists()] == [2, 8]
    rotate(folders[8], 1, None)
    assert [step for step, folder in folders.items() if folder.exists()] == [8]


def test_a_checkpoint_that_is_being_removed_is_not_whole(tmp_path):
    folder = written(tmp_path, 3)
    with stored(Store(tmp_path, Life(1).spend), local=True), pytest.raises(Died):
        discard(folder)
    assert folder.exists() and newest(tmp_path) is None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"data": "x", "order": "x"}, "--train_data has other files or rows"),
        ({"global_batch": 8, "order": "x"}, "--global_batch_size is 8, but 6"),
        ({"seed": 2, "order": "x"}, r"--seed \(or --data_seed\) is 2, but 1"),
        ({"gradient_accumulation_steps": 4}, "--gradient_accumulation_steps is 4, but 1"),
        ({"order": "x"}, "choose and order the rows"),
    ],
)
def test_a_run_of_another_kind_is_not_continued(tmp_path, changed, says):
    found = load(written(tmp_path, 3), "--resume_from_checkpoint")
    found.check(SAME)
    with pytest.raises(UserError, match=says):
        found.check(replace(SAME, **changed))


def test_an_identity_says_what_the_position_depends_on():
    def identity(size: int = 1000, rows: tuple[int, ...] = (30, 20), where: str = "/here", **order) -> Identity:
        files = [SourceFile("a.jsonl", f"{where}/a.jsonl", size, "jsonl", mtime_ns=size)]
        found = Survey(files, [], np.array(rows), np.array(rows), [], 0)
        return Identity.of(found, Order(rows, **{"global_batch": 6, "seed": 1, **order}), 1)

    same = identity()
    assert identity(where="/moved") == same
    assert identity(size=1001).data != same.data
    assert identity(rows=(20, 30)).data != same.data
    assert identity(drop_last=True) == replace(same, order=identity(drop_last=True).order) != same
    assert identity(seed=2).seed == 2 and identity(global_batch=8).global_batch == 8


def test_where_a_run_starts(tmp_path):
    storage, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    assert starting_point({}, False, storage) is None
    assert starting_point({}, True, storage) is None
    for step in (3, 6):
        written(storage, step)
    other = written(elsewhere, 1)
    assert starting_point({}, False, storage) is None
    assert starting_point({"resume_from_checkpoint": "False"}, False, storage) is None
    for training, resume in (({}, True), ({"resume_from_checkpoint": "True"}, False)):
        assert starting_point(training, resume, storage).step == 6
    assert starting_point({"resume_from_checkpoint": str(storage / "checkpoint-6")}, False, storage).step == 6
    assert starting_point({"resume_from_checkpoint": str(other)}, False, tmp_path / "new").step == 1
    for place in (storage / "checkpoint-3", other):
        with pytest.raises(UserError, match=r"a restart would continue from .*checkpoint-6 instead"):
            starting_point({"resume_from_checkpoint": str(place)}, False, storage)
    written(storage, 9, whole=False)
    for place in (storage / "checkpoint-9", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"--resume_from_checkpoint: .* is no whole checkpoint"):
            starting_point({"resume_from_checkpoint": str(place)}, False, storage)
    (storage / "checkpoint-9" / checkpoints.RECORD).write_text('{"step": 9')
    with pytest.raises(UserError, match=r"raybge.json cannot be read"):
        newest(storage)


def test_checkpoints_in_a_store_are_found_by_their_uris(tmp_path):
    """What a URI has behind it, a region or an endpoint, stays there. That of a folder is the folder."""
    (tmp_path / "bucket").mkdir()
    for step in (2, 10, 11):
        written(tmp_path / "bucket", step, whole=step < 11)
    with stored(Store(tmp_path)):
        for query in ("", "?region=eu&scheme=http"):
            storage = f"{URI}/bucket{query}"
            found = newest(storage)
            assert (found.path, found.step) == (f"{URI}/bucket/checkpoint-10{query}", 10)
            assert load(found.path, "--resume_from_checkpoint") == found
            assert starting_point({"resume_from_checkpoint": found.path}, False, storage) == found
            with pytest.raises(UserError, match=r"checkpoint-11.* is no whole checkpoint"):
                load(f"{URI}/bucket/checkpoint-11{query}", "--resume_from_checkpoint")
            assert newest(f"{URI}/nowhere{query}") is None
        rotate(f"{URI}/bucket/checkpoint-10?region=eu", 1, None)
    assert sorted(p.name for p in (tmp_path / "bucket").iterdir()) == ["checkpoint-10", "checkpoint-11"]
    assert newest(f"file://{tmp_path}/bucket").path == str(tmp_path / "bucket" / "checkpoint-10")


def test_a_place_that_cannot_be_written_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=lambda _: pytest.fail("it waits")))
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "folder")
    assert not any((tmp_path / "new" / "folder").iterdir())
    for place in (f"{tmp_path}/file", f"{tmp_path}/file/inside"):
        with pytest.raises(UserError, match=f"--storage_path {place} cannot be written"):
            check_writable(place)

    def refuse(what: str) -> None:
        raise PermissionError(13, "access denied")

    with stored(Store(tmp_path, refuse)), pytest.raises(UserError, match=f"{URI} cannot be written .*access denied"):
        check_writable(URI)


def model(folder: Path, says: str, *names: str) -> None:
    for name in ("config.json", "modules.json", "model.safetensors", checkpoints.RESULTS, *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"of": says}))


def test_a_model_takes_the_place_of_another_whole(tmp_path):
    output, aside = tmp_path / "out", tmp_path / "out" / ".raybge" / "model"
    model(output, "old", "adapter_config.json", "model-00001-of-00002.safetensors", "1_Pooling/config.json", "mine.txt")
    model(aside, "new", "2_Normalize/config.json")
    publish(aside, output)
    left = {str(p.relative_to(output)): json.loads(p.read_text())["of"] for p in output.rglob("*") if p.is_file()}
    assert left.pop("mine.txt") == "old"
    assert set(left.values()) == {"new"}
    assert set(left) == {
        "config.json",
        "modules.json",
        "model.safetensors",
        checkpoints.RESULTS,
        "2_Normalize/config.json",
    }
    assert not (output / "1_Pooling").exists()
    assert not aside.exists() and finished(output) == {"of": "new"}


@pytest.mark.parametrize("moves", range(5))
def test_a_model_that_is_half_moved_in_does_not_open(tmp_path, monkeypatch, moves):
    """Stopped before each move: nothing that a loader starts from is there beside what belongs to another model."""
    output, aside = tmp_path / "out", tmp_path / "out" / ".raybge" / "model"
    model(output, "old")
    model(aside, "new", "tokenizer.json")
    done = []
    move = Path.replace

    def replaced(path: Path, target: Path) -> Path:
        if len(done) == moves:
            raise OSError("no space left on device")
        done.append(path.name)
        return move(path, target)

    monkeypatch.setattr(Path, "replace", replaced)
    with pytest.raises(OSError):
        publish(aside, output)
    there = {p.name for p in output.iterdir() if p.is_file()}
    assert finished(output) is None
    assert "config.json" not in there or {"model.safetensors", "tokenizer.json"} <= there
    assert "modules.json" not in there or "config.json" in there
    assert all(json.loads((output / name).read_text())["of"] == "new" for name in there)
