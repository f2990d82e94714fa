"""Workers that end a run together: after the same update, whichever of them was told to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers


class Stopped(Exception):
    """Training ended where it was told to, and what is to be saved is saved."""


class Stopping(transformers.TrainerCallback):
    """Before an update the workers begin to add up who was told; behind its gradient the sum is there, with no waiting.

    Training then ends with `Stopped`, after a checkpoint unless --save_strategy is no. The last update of a run ends
    it anyway.

    Args:
        told: whether this worker was.
    """

    def __init__(self, told: Callable[[], bool]):
        self._told = told
        self._sum = torch.zeros(())
        self._work: Any = None
        self._stops = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._sum = torch.full((), float(self._told()), device=args.device)
        self._work = dist.all_reduce(self._sum, async_op=True) if dist.is_initialized() else None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._work is not None:
            self._work.wait()
        self._stops = bool(self._sum) and state.global_step + 1 < state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._stops:
            control.should_training_stop = True
            control.should_evaluate = False
            control.should_save = args.save_strategy != transformers.trainer_utils.SaveStrategy.NO

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer leaves an epoch where training is to stop; what it would do at its end is not wanted."""
        if self._stops:
            raise Stopped
