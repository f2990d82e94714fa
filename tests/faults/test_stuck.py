"""Workers that stand still, in real Ray Train runs: the missing one is named, and the run goes on without it."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import ray
from disturbed import before_each_step, make_flags, start_ray

from raybge.train import finetune


@pytest.fixture(scope="module", autouse=True)
def cluster():
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    """One epoch of 4 steps."""
    flags = make_flags(tmp_path_factory.mktemp("given"))
    return {**flags, "global_batch_size": 4, "num_train_epochs": 1, "stall_timeout": 5.0}


def stand_still(monkeypatch, note: Path, how) -> None:
    """Worker 1 does not get beyond its third step, once; its process id stands in `note`."""

    def act(trainer, inputs) -> None:
        if trainer.stream.rank == 1 and trainer.state.global_step == 2 and not note.exists():
            note.write_text(str(os.getpid()))
            how()

    before_each_step(monkeypatch, act)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSTOP), "has not been heard of for"),
        (lambda: time.sleep(600), "has been in step 3 for"),
    ],
    ids=["stopped", "hangs"],
)
def test_a_worker_that_stands_still_is_named_and_replaced(flags, tmp_path, monkeypatch, capfd, how, says):
    stand_still(monkeypatch, tmp_path / "pid", how)
    metrics = finetune(**flags, output_dir=str(tmp_path / "out"), max_failures=1)
    assert metrics["steps"] == 4
    message = capfd.readouterr().err
    pid = (tmp_path / "pid").read_text()
    assert re.search(rf"StallError: worker 1 \([\d.]+, pid {pid}\) {says} \d+ s", message)
    assert "continues from checkpoint-2, restart 1 of 1" in message
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
