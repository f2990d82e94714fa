"""Faults that strike a training worker from within, before it trains a chosen update, each of them once.

    python tests/faults/strikes.py '{"strikes": [[5, "worker"]], "marks": "/tmp/marks", "head": "..."}' --train_data ...

is `raybge.train` with such faults: kill -9 of a worker, of a raylet that is not the head's, or of the program. "stop"
raises; "wait" goes on once there is a file `marks`/go, "hold" never does.
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

from raybge.training import controller as launch
from raybge.training import worker as loop
from raybge.training.trainer import StreamTrainer


def train_struck(settings: dict, strikes: Sequence[tuple[int, str]], marks: str, head: str, program: int) -> None:
    """What runs in each worker. `marks`: folder of a file for each strike that was made, named UPDATE-WHAT."""
    whole = StreamTrainer.training_step
    away = ray.get_runtime_context().get_node_id() != head

    def training_step(self, *args, **kwargs):
        for update, what in strikes:
            hits = {"node": away, "worker": self.stream.rank == update % self.stream.world}
            mark = Path(marks, f"{update}-{what}")
            if self.state.global_step == update and hits.get(what, self.stream.rank == 0) and not mark.exists():
                mark.touch()
                strike(what)
        return whole(self, *args, **kwargs)

    def strike(what: str) -> None:
        if what == "wait":
            while not (Path(marks) / "go").exists():
                time.sleep(0.1)
            return
        if what == "stop":
            raise OSError(28, "No space left on device")
        if what != "hold":
            os.kill({"worker": os.getpid(), "node": os.getppid(), "driver": program}[what], signal.SIGKILL)
        time.sleep(600)  # a machine that is lost does nothing more, until this process is ended

    StreamTrainer.training_step = training_step
    try:
        loop.train_worker(settings)
    finally:
        StreamTrainer.training_step = whole


def struck(strikes: Sequence[tuple[int, str]], marks: str, head: str = ""):
    """To take the place of `raybge.training.controller._train_worker`."""
    return functools.partial(train_struck, strikes=strikes, marks=marks, head=head, program=os.getpid())


if __name__ == "__main__":
    from raybge.train import main

    launch._train_worker = struck(**json.loads(sys.argv[1]))
    raise SystemExit(main(sys.argv[2:]))
