"""Faults injected into training workers before chosen updates, each of them once.

    python tests/faults/fault_injection.py '{"faults": [[5, "worker"]], "markers": "/tmp/markers", "head": "..."}' \\
        --train_data ...

runs `raybge.train` with such faults: kill -9 of a worker ("worker"), of a raylet other than the head's ("node"), or of
the program ("driver"). "stop" raises an OSError, "wait" continues once there is a file `markers`/go, "hold" never does.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ray

from raybge.training import controller, worker
from raybge.training.trainer import StreamTrainer


def train_with_faults(settings: dict, faults: Sequence[tuple[int, str]], markers: str, head: str, program: int) -> None:
    """Train in a worker with faults.

    Args:
        settings: settings of `train_worker`.
        faults: (update, kind) of each fault.
        markers: folder of a file for each fault that was injected, named UPDATE-KIND.
        head: node id of the head.
        program: process id of the driver.
    """
    original = StreamTrainer.training_step
    raylet = int(os.environ["RAY_RAYLET_PID"])
    is_worker_node = ray.get_runtime_context().get_node_id() != head

    def training_step(self, *args, **kwargs):
        for update, kind in faults:
            victims = {"node": is_worker_node, "worker": self.stream.rank == update % self.stream.world}
            marker = Path(markers, f"{update}-{kind}")
            is_victim = victims.get(kind, self.stream.rank == 0)
            if self.state.global_step == update and is_victim and not marker.exists():
                marker.touch()
                inject(kind)
        return original(self, *args, **kwargs)

    def inject(kind: str) -> None:
        if kind == "wait":
            while not (Path(markers) / "go").exists():
                time.sleep(0.1)
            return
        if kind == "stop":
            raise OSError(28, "No space left on device")
        if kind != "hold":
            os.kill({"worker": os.getpid(), "node": raylet, "driver": program}[kind], signal.SIGKILL)
        time.sleep(600)  # a lost node does nothing more; this process is killed

    StreamTrainer.training_step = training_step
    try:
        worker.train_worker(settings)
    finally:
        StreamTrainer.training_step = original


def train_worker_with(faults: Sequence[tuple[int, str]], markers: str, head: str = "") -> functools.partial:
    """Return a replacement of `raybge.training.controller._train_worker`."""
    return functools.partial(train_with_faults, faults=faults, markers=markers, head=head, program=os.getpid())


if __name__ == "__main__":
    from raybge.train import main

    controller._train_worker = train_worker_with(**json.loads(sys.argv[1]))
    raise SystemExit(main(sys.argv[2:]))
