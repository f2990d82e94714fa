"""Graceful stop: all workers end the run after the same update, whichever of them received the request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers


class TrainingStopped(Exception):
    """Training ended on request, after saving a checkpoint unless --save_strategy is no."""


class GracefulStopCallback(transformers.TrainerCallback):
    """Ends training after an update when any worker was requested to stop.

    Before an update the workers start an asynchronous sum of their requests, which has finished when the gradient is
    there: no worker waits. Training then ends with `TrainingStopped`. The last update of a run ends it anyway.

    Args:
        stop_requested: returns whether this worker was requested to stop.
    """

    def __init__(self, stop_requested: Callable[[], bool]):
        self._stop_requested = stop_requested
        self._requests = torch.zeros(())
        self._work: Any = None
        self._stops = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the sum over the workers."""
        self._requests = torch.full((), float(self._stop_requested()), device=args.device)
        self._work = dist.all_reduce(self._requests, async_op=True) if dist.is_initialized() else None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide whether this update is the last."""
        if self._work is not None:
            self._work.wait()
        self._stops = bool(self._requests) and state.global_step + 1 < state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have the Trainer save a checkpoint and leave its loop."""
        if self._stops:
            control.should_training_stop = True
            control.should_evaluate = False
            control.should_save = args.save_strategy != transformers.trainer_utils.SaveStrategy.NO

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise TrainingStopped, which skips what the Trainer does at the end of a finished training."""
        if self._stops:
            raise TrainingStopped
