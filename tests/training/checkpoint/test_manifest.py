"""Complete and incomplete checkpoints, the one that a run resumes from, and whether it may resume."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from faulty_storage import URI, Lifetime, ProcessDied, limit_local_changes, use_store

from raybge.data.order import Order
from raybge.data.source_files import SourceFile
from raybge.data.survey import Survey
from raybge.training.checkpoint.manifest import (
    MANIFEST,
    RunIdentity,
    check_writable,
    commit_checkpoint,
    delete_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    resume_checkpoint,
    rotate_checkpoints,
)
from raybge.util import retry
from raybge.util.errors import UserError

IDENTITY = RunIdentity(data="d", global_batch=6, seed=1, gradient_accumulation_steps=1, order="o")


def write_checkpoint(storage: Path, step: int, complete: bool = True) -> Path:
    folder = storage / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights")
    if complete:
        commit_checkpoint(folder, step, 0, step, IDENTITY)
    return folder


def test_latest_complete_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 9)
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 11, complete=False)
    (tmp_path / "checkpoint-best").mkdir()  # not one of ours
    latest = latest_checkpoint(tmp_path)
    assert (latest.path, latest.step, latest.position, latest.identity) == (
        str(tmp_path / "checkpoint-10"),
        10,
        10,
        IDENTITY,
    )


def test_rotation_keeps_the_last_and_the_best(tmp_path):
    folders = {step: write_checkpoint(tmp_path, step) for step in (2, 4, 6, 8)}
    write_checkpoint(tmp_path, 10, complete=False)  # of a run that was lost later: does not count
    rotate_checkpoints(folders[8], None)
    assert all(folder.exists() for folder in folders.values())
    rotate_checkpoints(folders[8], 3, [str(folders[2])])
    assert [step for step, folder in folders.items() if folder.exists()] == [2, 6, 8]
    rotate_checkpoints(folders[8], 1, [str(folders[2])])
    assert [step for step, folder in folders.items() if folder.exists()] == [2, 8]
    rotate_checkpoints(folders[8], 1)
    assert [step for step, folder in folders.items() if folder.exists()] == [8]


def test_partly_deleted_checkpoint_is_incomplete(tmp_path):
    folder = write_checkpoint(tmp_path, 3)
    with limit_local_changes(Lifetime(1)), pytest.raises(ProcessDied):
        delete_checkpoint(folder)
    assert folder.exists() and latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "x", "order": "x"}, "--train_data has other files or rows"),
        ({"global_batch": 8, "order": "x"}, "--global_batch_size is 8, but 6"),
        ({"seed": 2, "order": "x"}, r"--seed \(or --data_seed\) is 2, but 1"),
        ({"gradient_accumulation_steps": 4}, "--gradient_accumulation_steps is 4, but 1"),
        ({"order": "x"}, "choose and order the rows"),
    ],
)
def test_run_with_another_identity_cannot_resume(tmp_path, changes, message):
    checkpoint = load_checkpoint(write_checkpoint(tmp_path, 3), "--resume_from_checkpoint")
    checkpoint.check(IDENTITY)
    with pytest.raises(UserError, match=message):
        checkpoint.check(replace(IDENTITY, **changes))


def test_identity_contains_what_the_position_depends_on():
    def identity(size: int = 1000, rows: tuple[int, ...] = (30, 20), folder: str = "/here", **order) -> RunIdentity:
        files = [SourceFile("a.jsonl", f"{folder}/a.jsonl", size, "jsonl", mtime_ns=size)]
        survey = Survey(files, [], np.array(rows), np.array(rows), [], 0)
        return RunIdentity.of(survey, Order(rows, **{"global_batch": 6, "seed": 1, **order}), 1)

    same = identity()
    assert identity(folder="/moved") == same
    assert identity(size=1001).data != same.data
    assert identity(rows=(20, 30)).data != same.data
    assert identity(drop_last=True) == replace(same, order=identity(drop_last=True).order) != same
    assert identity(seed=2).seed == 2 and identity(global_batch=8).global_batch == 8


def test_checkpoint_to_resume_from(tmp_path):
    storage, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    assert resume_checkpoint({}, False, storage) is None
    assert resume_checkpoint({}, True, storage) is None
    for step in (3, 6):
        write_checkpoint(storage, step)
    other = write_checkpoint(elsewhere, 1)
    assert resume_checkpoint({}, False, storage) is None
    assert resume_checkpoint({"resume_from_checkpoint": "False"}, False, storage) is None
    for training, resume in (({}, True), ({"resume_from_checkpoint": "True"}, False)):
        assert resume_checkpoint(training, resume, storage).step == 6
    assert resume_checkpoint({"resume_from_checkpoint": str(storage / "checkpoint-6")}, False, storage).step == 6
    assert resume_checkpoint({"resume_from_checkpoint": str(other)}, False, tmp_path / "new").step == 1
    for path in (storage / "checkpoint-3", other):
        with pytest.raises(UserError, match=r"a restart would continue from .*checkpoint-6 instead"):
            resume_checkpoint({"resume_from_checkpoint": str(path)}, False, storage)
    write_checkpoint(storage, 9, complete=False)
    for path in (storage / "checkpoint-9", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"--resume_from_checkpoint: .* is not a complete checkpoint"):
            resume_checkpoint({"resume_from_checkpoint": str(path)}, False, storage)
    (storage / "checkpoint-9" / MANIFEST).write_text('{"step": 9')
    with pytest.raises(UserError, match=r"raybge.json cannot be read"):
        latest_checkpoint(storage)


def test_checkpoints_in_a_store(tmp_path):
    """The query of a URI, a region or an endpoint, stays at its end. The URI of a local folder becomes its path."""
    (tmp_path / "bucket").mkdir()
    for step in (2, 10, 11):
        write_checkpoint(tmp_path / "bucket", step, complete=step < 11)
    use_store(tmp_path)
    for query in ("", "?region=eu&scheme=http"):
        storage = f"{URI}/bucket{query}"
        latest = latest_checkpoint(storage)
        assert (latest.path, latest.step) == (f"{URI}/bucket/checkpoint-10{query}", 10)
        assert load_checkpoint(latest.path, "--resume_from_checkpoint") == latest
        assert resume_checkpoint({"resume_from_checkpoint": latest.path}, False, storage) == latest
        with pytest.raises(UserError, match=r"checkpoint-11.* is not a complete checkpoint"):
            load_checkpoint(f"{URI}/bucket/checkpoint-11{query}", "--resume_from_checkpoint")
        assert latest_checkpoint(f"{URI}/nowhere{query}") is None
    rotate_checkpoints(f"{URI}/bucket/checkpoint-10?region=eu", 1)
    assert sorted(p.name for p in (tmp_path / "bucket").iterdir()) == ["checkpoint-10", "checkpoint-11"]
    assert latest_checkpoint(f"file://{tmp_path}/bucket").path == str(tmp_path / "bucket" / "checkpoint-10")


def test_unwritable_storage_is_reported_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=lambda _: pytest.fail("it waits")))
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "folder")
    assert not any((tmp_path / "new" / "folder").iterdir())
    for path in (f"{tmp_path}/file", f"{tmp_path}/file/inside"):
        with pytest.raises(UserError, match=f"--storage_path {path} cannot be written"):
            check_writable(path)

    def refuse(action: str) -> None:
        raise PermissionError(13, "access denied")

    use_store(tmp_path, refuse)
    with pytest.raises(UserError, match=f"{URI} cannot be written .*access denied"):
        check_writable(URI)
