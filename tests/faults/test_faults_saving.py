"""The Trainer's own checkpoints on disks and stores that are slow, full, far away or not to be trusted."""

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
from faulty import URI, Store, stored
from streams import Scripted, Stop, StopAt, stream_trainer, surveyed, weights
from tiny import make_tiny

from raybge.training.checkpoint.manifest import newest
from raybge.training.checkpoint.writer import CheckpointWriter
from raybge.util import retry
from raybge.util.errors import UserError

EVERY_4 = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """With dropout: a resumed run has to restore the random state too."""
    model = make_tiny(tmp_path_factory.mktemp("model") / "tiny", dropout=0.1)
    found = surveyed(tmp_path_factory.mktemp("data"))
    return lambda folder, callbacks=(), **more: stream_trainer(found, model, folder, callbacks, **more)


@pytest.fixture(autouse=True)
def node(tmp_path, monkeypatch) -> Path:
    """A node's temporary folder, and no waiting."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    monkeypatch.setattr(retry, "WAITS", (0, 0))
    return tmp_path / "node"


class AtStep(transformers.TrainerCallback):
    """Does something when an update is done."""

    def __init__(self, step: int, act) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.act()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=atol, rtol=0)


def test_training_goes_on_while_a_checkpoint_is_published(trainer, tmp_path, monkeypatch):
    """What is published waits for the update after the next: nothing would end if training waited for it."""
    free, freed, order = threading.Event(), [], []
    publish = CheckpointWriter._publish

    def blocked(writer: CheckpointWriter, what: Any) -> None:
        freed.append(free.wait(60))
        order.append(f"published {what.step}")
        publish(writer, what)

    monkeypatch.setattr(CheckpointWriter, "_publish", blocked)

    def two_later() -> None:
        order.append("trained 6")
        assert newest(tmp_path) is None
        free.set()

    made = trainer(tmp_path, [AtStep(6, two_later)], **EVERY_4)
    made.train()
    assert freed == [True] * 3
    assert order == ["trained 6", "published 4", "published 8", "published 12"]
    assert newest(tmp_path).step == 12  # the end of training waits


def test_a_run_in_a_store_ends_as_one_in_a_folder(trainer, tmp_path, node):
    """Lost and resumed, with one checkpoint kept beside the best, which is loaded at the end."""
    flags = dict(EVERY_4, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="nDCG@10")
    flags |= dict(eval_strategy="steps", eval_steps=4)
    local = trainer(tmp_path / "local", validation=Scripted([0.5, 0.9, 0.7]), **flags)
    local.train()
    told: list[str] = []
    flags |= dict(storage=URI, on_checkpoint=told.append)
    with stored(Store(tmp_path / "store")):
        lost = trainer(tmp_path / "out", [StopAt(10)], validation=Scripted([0.5, 0.9]), **flags)
        with pytest.raises(Stop):
            lost.train()
        lost.writer.close()
        assert newest(URI).step == 8
        resumed = trainer(tmp_path / "out", validation=Scripted([0.7]), **flags)
        resumed.train(resume_from_checkpoint=resumed.scratch.fetched(newest(URI).path))
        resumed.writer.close()
    assert told == [f"{URI}/checkpoint-4", f"{URI}/checkpoint-12"]  # before the 8th is reported the first run is lost
    assert resumed.state.best_model_checkpoint == f"{URI}/checkpoint-8"
    assert sorted(os.listdir(tmp_path / "store")) == ["checkpoint-8"]
    assert_same(weights(resumed), weights(local))
    assert not any(node.iterdir()) and not list(tmp_path.glob("out/checkpoint-*"))


def test_a_store_that_fails_for_good_ends_the_run_at_the_next_checkpoint(trainer, tmp_path):
    def before(what: str) -> None:
        if "checkpoint-8" in what:
            raise OSError(errno.EIO, "connection reset")

    steps: list[int] = []
    with stored(Store(tmp_path / "store", before)):
        made = trainer(tmp_path / "out", [AtStep(11, lambda: steps.append(11))], storage=URI, **EVERY_4)
        with pytest.raises(UserError, match="checkpoint-8 cannot be written .*connection reset.*checkpoint-4 is whole"):
            made.train()
        assert newest(URI).step == 4 and steps == [11]


@pytest.fixture
def small_disk(tmp_path):
    """Makes a folder that holds so many bytes."""
    mounted = []

    def make(size: int) -> Path:
        folder = tmp_path / "small"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only who may mount can make a small disk")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_leaves_the_checkpoint_before(trainer, tmp_path, small_disk):
    """There is room for one and a half."""
    trainer(tmp_path / "roomy", **EVERY_4).train()
    one = sum(p.stat().st_size for p in (tmp_path / "roomy" / "checkpoint-4").rglob("*") if p.is_file())
    disk = small_disk(one * 3 // 2)
    with pytest.raises(UserError, match="checkpoint-8 cannot be written .*the disk is full.*checkpoint-4 is whole"):
        trainer(disk, **EVERY_4).train()
    start = newest(disk)
    assert start.step == 4 and not list(disk.glob(".raybge/*/checkpoint-8"))  # what was half there gives room again
    subprocess.run(["mount", "-o", f"remount,size={one * 5}", str(disk)], check=True)
    trainer(disk, **EVERY_4).train(resume_from_checkpoint=start.path)
    assert newest(disk).step == 12


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.mark.parametrize("writes", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("optimizer.pt", "optimizer or scheduler"),
        ("scheduler.pt", "optimizer or scheduler"),
        ("scaler.pt", "scaler"),
        ("rng_state.pth", "random state"),
    ],
)
def test_a_checkpoint_is_not_unpickled(trainer, tmp_path, name, part, writes):
    made = trainer(tmp_path, **EVERY_4 | {"max_steps": 4})
    made.train()
    folder = tmp_path / "checkpoint-4"
    writes({"state": Evil(str(tmp_path / "harm"))}, folder / name)
    resumed = trainer(tmp_path, **EVERY_4)
    resumed.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(UserError, match=f"the {part} in {folder} is refused"):
        resumed.train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "harm").exists()
    with open(folder / name, "rb") as file:
        torch.load(file, weights_only=False) if writes is torch.save else pickle.load(file)
    assert (tmp_path / "harm").exists()  # it would have


def test_a_checkpoint_in_shards_is_not_unpickled(trainer, tmp_path, monkeypatch):
    """Before any of it is read, when a run goes on and when its best model is loaded."""
    made = trainer(tmp_path, **EVERY_4 | {"max_steps": 4})
    made.train()
    folder = tmp_path / "checkpoint-4"
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Evil(str(tmp_path / "harm"))))
    with pytest.raises(UserError, match=f"the state in {folder} is refused"):
        trainer(tmp_path, **EVERY_4).train(resume_from_checkpoint=str(folder))
    made.is_fsdp_enabled, made.state.best_model_checkpoint = True, str(folder)
    with pytest.raises(UserError, match=f"the best model in {folder} is refused"):
        made._load_best_model()
    assert not (tmp_path / "harm").exists()


def test_the_scaler_of_half_precision_is_left_where_there_is_none(trainer, tmp_path):
    trainer(tmp_path, **EVERY_4 | {"max_steps": 4}).train()
    torch.save({"scale": 2.0}, tmp_path / "checkpoint-4" / "scaler.pt")
    trainer(tmp_path, **EVERY_4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert newest(tmp_path).step == 12
