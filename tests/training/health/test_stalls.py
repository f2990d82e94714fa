"""Stalled workers: the worker is named, and the run continues without it."""

import os
import re
import signal
import time

import pytest
from faulty_runs import before_each_step, make_flags

from raybge.train import finetune

pytestmark = pytest.mark.usefixtures("worker_processes")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    """Return the flags of a run of one epoch of 4 steps."""
    flags = make_flags(tmp_path_factory.mktemp("inputs"))
    return {**flags, "global_batch_size": 4, "num_train_epochs": 1, "stall_timeout": 5.0}


def test_stalled_worker_is_named_and_replaced(flags, tmp_path, monkeypatch, capfd):
    """Worker 1 does not pass its third step: first its process is stopped, then that of the next attempt hangs."""

    def stall(trainer, inputs) -> None:
        if trainer.stream.rank == 1 and trainer.state.global_step == 2:
            for name in ("stopped", "hanging"):
                if not (note := tmp_path / name).exists():
                    note.write_text(str(os.getpid()))
                    if name == "stopped":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    time.sleep(600)  # also when stopped: another thread receives the signal

    before_each_step(monkeypatch, stall)
    result = finetune(**flags, output_dir=str(tmp_path / "out"), max_failures=2)
    assert result.metrics["steps"] == 4
    console = capfd.readouterr().err
    failures = re.findall(r"a worker failed \((.*)", console)
    assert len(failures) == 2, console
    pids = [(tmp_path / name).read_text() for name in ("stopped", "hanging")]
    reasons = ["has sent no heartbeat for", "has been in step 3 for"]
    for restart, (line, pid, reason) in enumerate(zip(failures, pids, reasons, strict=True), 1):
        assert re.match(rf"WorkerStallError: worker 1 \([\d.]+, pid {pid}\) {reason} \d+ s", line), failures
        assert f"continues from checkpoint-2, restart {restart} of 2" in line, failures
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
