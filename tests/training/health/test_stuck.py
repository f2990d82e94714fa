"""Workers that stand still, in real Ray Train runs: the missing one is named, and the run goes on without it."""

import os
import re
import signal
import time

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


def test_a_worker_that_stands_still_is_named_and_replaced(flags, tmp_path, monkeypatch, capfd):
    """Worker 1 does not get beyond its third step: first its process is stopped, then the next one hangs."""

    def act(trainer, inputs) -> None:
        if trainer.stream.rank == 1 and trainer.state.global_step == 2:
            for name in ("stopped", "hangs"):
                if not (note := tmp_path / name).exists():
                    note.write_text(str(os.getpid()))
                    if name == "stopped":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    time.sleep(600)  # also when stopped: it is another thread that takes the signal

    before_each_step(monkeypatch, act)
    metrics = finetune(**flags, output_dir=str(tmp_path / "out"), max_failures=2)
    assert metrics["steps"] == 4
    console = capfd.readouterr().err
    said = re.findall(r"a worker failed \((.*)", console)
    assert len(said) == 2, console
    pids = [(tmp_path / name).read_text() for name in ("stopped", "hangs")]
    for restart, (line, pid, what) in enumerate(
        zip(said, pids, ["has not been heard of for", "has been in step 3 for"], strict=True), 1
    ):
        assert re.match(rf"StallError: worker 1 \([\d.]+, pid {pid}\) {what} \d+ s", line), said
        assert f"continues from checkpoint-2, restart {restart} of 2" in line, said
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
