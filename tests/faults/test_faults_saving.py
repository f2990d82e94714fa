"""Checkpoints of the Trainer on disks and stores that are slow, full, remote or not trustworthy."""

import errno
import os
import pickle
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from faulty_storage import URI, use_store
from tiny import make_tiny
from trainers import FailAt, RunLost, ScriptedValidation, build_survey, build_trainer, weights

from raybge.training.checkpoint.manifest import latest_checkpoint
from raybge.training.checkpoint.writer import CheckpointWriter
from raybge.util import retry
from raybge.util.errors import UserError

EVERY_4 = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}


@pytest.fixture(scope="module")
def make_trainer(tmp_path_factory):
    """Return a function that builds a trainer with dropout: a resumed run must restore the random state too."""
    model = make_tiny(tmp_path_factory.mktemp("model") / "tiny", dropout=0.1)
    data = build_survey(tmp_path_factory.mktemp("data"))
    return lambda folder, callbacks=(), **more: build_trainer(data, model, folder, callbacks, **more)


@pytest.fixture(autouse=True)
def node(tmp_path, monkeypatch) -> Path:
    """Return the node's temporary folder; retries do not wait."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    monkeypatch.setattr(retry, "WAITS", (0, 0))
    return tmp_path / "node"


class CallAt(transformers.TrainerCallback):
    """Calls a function after an update."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.action()


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


def test_training_continues_while_a_checkpoint_is_published(make_trainer, tmp_path, monkeypatch):
    """The publication waits for a later update: if training waited for it, neither would end."""
    released, results, order = threading.Event(), [], []
    publish = CheckpointWriter._publish

    def blocked_publish(writer: CheckpointWriter, request: Any) -> None:
        results.append(released.wait(60))
        order.append(f"published {request.step}")
        publish(writer, request)

    monkeypatch.setattr(CheckpointWriter, "_publish", blocked_publish)

    def two_later() -> None:
        order.append("trained 6")
        assert latest_checkpoint(tmp_path) is None
        released.set()

    make_trainer(tmp_path, [CallAt(6, two_later)], **EVERY_4).train()
    assert results == [True] * 3
    assert order == ["trained 6", "published 4", "published 8", "published 12"]
    assert latest_checkpoint(tmp_path).step == 12  # the end of training waits


def test_run_in_a_store_equals_one_in_a_folder(make_trainer, tmp_path, node):
    """Lost and resumed, with one checkpoint in addition to the best one, which is loaded at the end."""
    flags = dict(EVERY_4, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="nDCG@10")
    flags |= dict(eval_strategy="steps", eval_steps=4)
    local = make_trainer(tmp_path / "local", validation=ScriptedValidation([0.5, 0.9, 0.7]), **flags)
    local.train()
    reported: list[str] = []
    flags |= dict(storage=URI, on_checkpoint=reported.append)
    use_store(tmp_path / "store")
    lost = make_trainer(tmp_path / "out", [FailAt(10)], validation=ScriptedValidation([0.5, 0.9]), **flags)
    with pytest.raises(RunLost):
        lost.train()
    lost.writer.close()
    assert latest_checkpoint(URI).step == 8
    resumed = make_trainer(tmp_path / "out", validation=ScriptedValidation([0.7]), **flags)
    resumed.train(resume_from_checkpoint=resumed.staging.fetch(latest_checkpoint(URI).path))
    resumed.writer.close()
    assert reported == [
        f"{URI}/checkpoint-4",
        f"{URI}/checkpoint-12",
    ]  # the first run is lost before it reports the 8th
    assert resumed.state.best_model_checkpoint == f"{URI}/checkpoint-8"
    assert sorted(os.listdir(tmp_path / "store")) == ["checkpoint-8"]
    assert_same(weights(resumed), weights(local))
    assert not any(node.iterdir()) and not list(tmp_path.glob("out/checkpoint-*"))


def test_lasting_error_of_a_store_ends_the_run_at_the_next_checkpoint(make_trainer, tmp_path):
    def before(action: str) -> None:
        if "checkpoint-8" in action:
            raise OSError(errno.EIO, "connection reset")

    steps: list[int] = []
    use_store(tmp_path / "store", before)
    trainer = make_trainer(tmp_path / "out", [CallAt(11, lambda: steps.append(11))], storage=URI, **EVERY_4)
    with pytest.raises(UserError, match="checkpoint-8 cannot be written .*connection reset.*checkpoint-4 is complete"):
        trainer.train()
    assert latest_checkpoint(URI).step == 4 and steps == [11]


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a disk of a given size in bytes."""
    mounts = []

    def make(size: int) -> Path:
        folder = tmp_path / "small"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk requires root")
        mounts.append(folder)
        return folder

    yield make
    for folder in mounts:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_reported_and_keeps_the_previous_checkpoint(make_trainer, tmp_path, small_disk):
    """The disk has room for one and a half checkpoints."""
    make_trainer(tmp_path / "roomy", **EVERY_4).train()
    size = sum(p.stat().st_size for p in (tmp_path / "roomy" / "checkpoint-4").rglob("*") if p.is_file())
    disk = small_disk(size * 3 // 2)
    with pytest.raises(UserError, match="checkpoint-8 cannot be written .*the disk is full.*checkpoint-4 is complete"):
        make_trainer(disk, **EVERY_4).train()
    start = latest_checkpoint(disk)
    assert start.step == 4 and not list(disk.glob(".raybge/*/checkpoint-8"))  # the incomplete one is deleted
    subprocess.run(["mount", "-o", f"remount,size={size * 5}", str(disk)], check=True)
    make_trainer(disk, **EVERY_4).train(resume_from_checkpoint=start.path)
    assert latest_checkpoint(disk).step == 12


class Malicious:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("optimizer.pt", "optimizer or scheduler"),
        ("scheduler.pt", "optimizer or scheduler"),
        ("scaler.pt", "scaler"),
        ("rng_state.pth", "random state"),
    ],
)
def test_checkpoint_is_not_unpickled(make_trainer, tmp_path, name, part, write):
    trainer = make_trainer(tmp_path, **EVERY_4 | {"max_steps": 4})
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    write({"state": Malicious(str(tmp_path / "created"))}, folder / name)
    resumed = make_trainer(tmp_path, **EVERY_4)
    resumed.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(UserError, match=f"the {part} in {folder} is refused"):
        resumed.train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "created").exists()
    with open(folder / name, "rb") as file:
        torch.load(file, weights_only=False) if write is torch.save else pickle.load(file)
    assert (tmp_path / "created").exists()  # without protection


def test_sharded_checkpoint_is_not_unpickled(make_trainer, tmp_path, monkeypatch):
    """Neither when a run resumes nor when its best model is loaded."""
    trainer = make_trainer(tmp_path, **EVERY_4 | {"max_steps": 4})
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Malicious(str(tmp_path / "created"))))
    with pytest.raises(UserError, match=f"the state in {folder} is refused"):
        make_trainer(tmp_path, **EVERY_4).train(resume_from_checkpoint=str(folder))
    trainer.is_fsdp_enabled, trainer.state.best_model_checkpoint = True, str(folder)
    with pytest.raises(UserError, match=f"the model in {folder} is refused"):
        trainer.load_best_model()
    assert not (tmp_path / "created").exists()


def test_scaler_is_ignored_without_half_precision(make_trainer, tmp_path):
    make_trainer(tmp_path, **EVERY_4 | {"max_steps": 4}).train()
    torch.save({"scale": 2.0}, tmp_path / "checkpoint-4" / "scaler.pt")
    make_trainer(tmp_path, **EVERY_4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert latest_checkpoint(tmp_path).step == 12
