"""transformers' Trainer with hooks at six steps of its loop: the only private methods of it that raybge overrides.

The loop itself, the optimizers, schedules, callbacks, reporting tools, DeepSpeed and FSDP stay transformers' own. At
these six places it has no public hook; each override passes on to a public method of `HookedTrainer`, which a subclass
implements. `HookedTrainer` has one subclass: it is a class of its own so that all private names are in this package.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from raybge.compat.library_versions import require

PRIVATE_METHODS = (
    "_init_training_state",
    "_run_epoch",
    "_get_grad_norm",
    "_save_checkpoint",
    "_load_best_model",
    "_finalize_training",
)


class HookedTrainer(transformers.Trainer):
    """transformers' Trainer whose state, position in the data, gradients and checkpoints are those of a subclass.

    Attributes:
        resume_folder: local folder of the checkpoint whose state the run continues from; None for a new run. It is not
            passed to `train`, which would load the rest of the checkpoint in its own way.
    """

    resume_folder: str | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        """Create the Trainer. Raises UnsupportedVersionError if it lacks a method that is overridden here."""
        for name in PRIVATE_METHODS:
            require(transformers.Trainer, name, "transformers")
        super().__init__(*args, **kwargs)

    def restore_state(self, max_steps: int) -> None:
        """Adjust `self.state`, which is new or that of `resume_folder`, before training."""

    def updates_done(self, epoch: int, updates: int) -> int | None:
        """Return how many of the epoch's updates are done already; None to end training without it."""
        raise NotImplementedError

    def check_gradients(self, model: nn.Module, norm: Any) -> Any:
        """Inspect or delete the gradients before an update, given their norm. Return the norm to log."""
        raise NotImplementedError

    def save_checkpoint(self) -> None:
        """Save a checkpoint of the current update."""
        raise NotImplementedError

    def load_best_model(self) -> None:
        """Load the model of the best checkpoint, with --load_best_model_at_end."""
        raise NotImplementedError

    def complete_checkpoints(self) -> None:
        """Wait for the last checkpoint, before the Trainer loads the best model and ends its callbacks."""

    @property
    def mean_logged_loss(self) -> torch.Tensor:
        """Mean of the losses since the last entry of the log, over the steps up to the current one; a scalar."""
        logged_step = require(self, "_globalstep_last_logged", "transformers")
        mean: torch.Tensor = require(self, "_tr_loss", "transformers") / (1 + self.state.global_step - logged_step)
        return mean

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """Read the state of `resume_folder`; the first epoch and the steps to skip follow from it."""
        updates, epochs, _, trial = args
        start: tuple[int, int] = super()._init_training_state(max_steps, updates, epochs, self.resume_folder, trial)
        self.restore_state(max_steps)
        return start

    def _run_epoch(self, **arguments: Any) -> None:
        """Run the rest of an epoch whose data source starts at the first update that is not done.

        The Trainer would have accelerate skip batches of a DataLoader, which reads them all.
        """
        done = self.updates_done(arguments["epoch"], arguments["num_update_steps_per_epoch"])
        if done is None:
            self.control.should_training_stop = True
            return
        arguments["num_update_steps_per_epoch"] -= done
        arguments["steps_in_epoch"] -= done * self.args.gradient_accumulation_steps
        super()._run_epoch(**arguments)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Pass the norm on to `check_gradients`: it is called before each update, after gradients are clipped."""
        return self.check_gradients(model, super()._get_grad_norm(model, grad_norm))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Leave files, folder and deletion of old checkpoints to `save_checkpoint`."""
        self.save_checkpoint()

    def _load_best_model(self) -> None:
        """Leave the search for the best checkpoint to `load_best_model`: the Trainer's finds local folders only."""
        self.load_best_model()

    def _finalize_training(self, *args: Any) -> Any:
        """Complete the checkpoints first: the time of a run includes them, and callbacks find them."""
        self.complete_checkpoints()
        return super()._finalize_training(*args)
