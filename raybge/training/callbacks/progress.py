"""Progress of a running training, reported by worker 0 to the driver's progress bar."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import transformers

from raybge.compat.transformers import learning_rate
from raybge.evaluation.metrics import retrieval_metrics
from raybge.training.health.run_state import RunState
from raybge.util.activity import set_activity

if TYPE_CHECKING:
    from raybge.training.trainer import StreamTrainer

REPORT_SECONDS = 0.5


class ProgressCallback(transformers.TrainerCallback):
    """Corrects the epoch's fraction and, on worker 0, reports step and loss to the driver twice a second.

    Args:
        run_state: receives the reports; None on other workers.

    Attributes:
        trainer: the trainer that calls back; to be set before training.
    """

    def __init__(self, run_state: RunState | None):
        self.run_state = run_state
        self.trainer: StreamTrainer | None = None
        self._last_report = 0.0
        self._learning_rate = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the length of the run and where it starts."""
        if self.run_state:
            self.run_state.set_started(state.max_steps, state.global_step)
        assert self.trainer is not None
        self.trainer.step_metrics.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remember the learning rate of the update."""
        assert self.trainer is not None
        set_activity(f"step {state.global_step + 1:,}")
        self._learning_rate = learning_rate(self.trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the update and report it."""
        assert self.trainer is not None
        set_activity(f"the end of step {state.global_step:,}")
        stream = self.trainer.stream
        if stream.start_step:  # the Trainer took the rest of a resumed epoch for a whole one
            rest = state.epoch - stream.epoch
            state.epoch = stream.epoch + (stream.start_step + rest * (len(stream) - stream.start_step)) / len(stream)
        if stream.rank:
            return
        self.trainer.step_metrics.add_update(state.global_step, self._learning_rate)
        now = time.monotonic()
        if now - self._last_report >= REPORT_SECONDS or state.global_step == state.max_steps:
            self._last_report = now
            loss = self.trainer.step_metrics.resolve()
            if self.run_state:
                self.run_state.set_progress(state.global_step, loss)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any) -> None:
        """Report the retrieval metrics of an evaluation."""
        if self.run_state:
            seconds = metrics.get("eval_runtime", 0.0)
            self.run_state.add_evaluation(state.global_step, retrieval_metrics(metrics), seconds)
