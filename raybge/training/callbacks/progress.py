"""What a training run says of itself while it runs: how far it is, to the driver's bar."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import transformers

from raybge.training.health.run_state import Board
from raybge.util.activity import at

if TYPE_CHECKING:
    from raybge.training.trainer import StreamTrainer

REPORT_SECONDS = 0.5


class Reporter(transformers.TrainerCallback):
    """Keeps the epoch's fraction right, and on worker 0 tells the driver's bar where the run is, twice a second."""

    def __init__(self, board: Board | None):
        self.board = board
        self.trainer: StreamTrainer | None = None
        self.told = 0.0
        self.rate = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.board:
            self.board.begin(state.max_steps, state.global_step)
        assert self.trainer is not None
        self.trainer.steps.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.trainer is not None
        at(f"step {state.global_step + 1:,}")
        self.rate = self.trainer._get_learning_rate()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.trainer is not None
        at(f"the end of step {state.global_step:,}")
        stream = self.trainer.stream
        if stream.start_step:  # the Trainer counted the part of the epoch that was left
            left = state.epoch - stream.epoch
            state.epoch = stream.epoch + (stream.start_step + left * (len(stream) - stream.start_step)) / len(stream)
        if stream.rank:
            return
        self.trainer.steps.update(state.global_step, self.rate)
        now = time.monotonic()
        if now - self.told >= REPORT_SECONDS or state.global_step == state.max_steps:
            self.told = now
            loss = self.trainer.steps.resolve()
            if self.board:
                self.board.tell(state.global_step, loss)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any) -> None:
        if self.board:
            found = {name.removeprefix("eval_"): value for name, value in metrics.items() if "@" in name}
            self.board.measured(state.global_step, found)
