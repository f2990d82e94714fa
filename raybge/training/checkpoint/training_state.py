"""State of training in a checkpoint, next to the model: optimizer, schedule, loss scale, random state.

File names and contents are those of transformers' Trainer. With FSDP and DeepSpeed the state is in their own formats,
which all workers write and read together.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.trainer_pt_utils import safe_globals

from raybge.compat.torch import set_logged_rates
from raybge.training.checkpoint.safe_load import safe_loading
from raybge.util.errors import UserError

if TYPE_CHECKING:
    import transformers

OPTIMIZER, SCHEDULER, SCALER = "optimizer.pt", "scheduler.pt", "scaler.pt"

Write = Callable[[Callable[[], None]], None]  # calls the function that it gets, with retries


def save_training_state(trainer: transformers.Trainer, folder: str, write: Write) -> None:
    """Write the state of training into a checkpoint's folder. Collective with FSDP and DeepSpeed.

    Args:
        trainer: the trainer, between two updates.
        folder: the checkpoint's folder.
        write: runs each action that writes a file. Shards are written by all workers together: one of them cannot
            retry alone, so they are written without it.
    """
    is_main, scaler = trainer.args.should_save, trainer.accelerator.scaler
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed.save_checkpoint(folder)
    elif trainer.is_fsdp_enabled:
        from accelerate.utils import save_fsdp_model, save_fsdp_optimizer

        plugin = trainer.accelerator.state.fsdp_plugin
        save_fsdp_model(plugin, trainer.accelerator, trainer.model, folder, adapter_only=True)
        save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, folder)
    elif is_main:
        write(lambda: torch.save(trainer.optimizer.state_dict(), Path(folder, OPTIMIZER)))
    if is_main and not _deepspeed_schedules(trainer):
        write(lambda: torch.save(trainer.lr_scheduler.state_dict(), Path(folder, SCHEDULER)))
    if is_main and scaler is not None:
        write(lambda: torch.save(scaler.state_dict(), Path(folder, SCALER)))
    write(lambda: _save_random_state(_random_file(trainer, folder)))


def load_training_state(trainer: transformers.Trainer, folder: str) -> None:
    """Load the state of training, and with FSDP and DeepSpeed the model. Collective.

    The learning rate is that of the trainer's own flags, which may differ from that in the checkpoint; so is the use
    of a loss scale.

    Args:
        trainer: the trainer, after it has prepared model, optimizer and schedule.
        folder: local folder of the checkpoint.

    Raises:
        UserError: a file contains more than tensors and numbers, or is damaged.
    """
    with safe_loading(folder, "state"):
        if _is_sharded(trainer):
            load_sharded_model(trainer, folder)
    names = [*([] if _is_sharded(trainer) else [OPTIMIZER]), *([] if _deepspeed_schedules(trainer) else [SCHEDULER])]
    for name in names:
        if not Path(folder, name).is_file():
            raise UserError(f"{folder} cannot be continued: it has no {name}")
    base_rates: Any = getattr(trainer.lr_scheduler, "base_lrs", None)
    with safe_loading(folder, "optimizer or scheduler"):
        _load_optimizer(trainer, folder)
    if isinstance(trainer.lr_scheduler, torch.optim.lr_scheduler.LambdaLR):
        _set_rates(trainer.lr_scheduler, trainer.optimizer, base_rates)
    scaler = trainer.accelerator.scaler
    if scaler is not None and Path(folder, SCALER).is_file():
        with safe_loading(folder, "scaler"):
            scaler.load_state_dict(torch.load(Path(folder, SCALER), weights_only=True))


def load_random_state(trainer: transformers.Trainer, folder: str) -> None:
    """Restore this worker's random state; a worker that the checkpoint's run did not have keeps its own.

    Args:
        trainer: the trainer.
        folder: local folder of the checkpoint.

    Raises:
        UserError: the file contains more than tensors and numbers, or is damaged.
    """
    path = _random_file(trainer, folder)
    if not path.is_file():
        return
    with safe_loading(folder, "random state"), safe_globals():
        state = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        states = state["cuda"] if isinstance(state["cuda"], list) else [state["cuda"]]
        for device, each in enumerate(states[: torch.cuda.device_count()]):
            torch.cuda.random.set_rng_state(each, device)


def load_sharded_model(trainer: transformers.Trainer, folder: str) -> None:
    """Load the model of a checkpoint that FSDP or DeepSpeed has written. Collective."""
    if trainer.is_deepspeed_enabled:
        from transformers.integrations import deepspeed_load_checkpoint

        deepspeed_load_checkpoint(trainer.deepspeed, folder)
    else:
        from accelerate.utils import load_fsdp_model

        plugin = trainer.accelerator.state.fsdp_plugin
        load_fsdp_model(plugin, trainer.accelerator, trainer.model, folder, adapter_only=True)


def _load_optimizer(trainer: transformers.Trainer, folder: str) -> None:
    if trainer.is_fsdp_enabled:
        from accelerate.utils import load_fsdp_optimizer

        plugin = trainer.accelerator.state.fsdp_plugin
        load_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, folder, adapter_only=True)
    elif not trainer.is_deepspeed_enabled:  # DeepSpeed loads it with the model
        # On one GPU by way of the CPU: the state in the file and in the optimizer would not fit next to each other.
        device = trainer.args.device if trainer.args.world_size > 1 and trainer.args.device.type != "cpu" else "cpu"
        trainer.optimizer.load_state_dict(torch.load(Path(folder, OPTIMIZER), map_location=device, weights_only=True))
    if not _deepspeed_schedules(trainer):
        trainer.lr_scheduler.load_state_dict(torch.load(Path(folder, SCHEDULER), weights_only=True))


def _set_rates(schedule: torch.optim.lr_scheduler.LambdaLR, optimizer: Any, base_rates: list[float]) -> None:
    """Continue the schedule at its position with other base rates, one for each parameter group."""
    schedule.base_lrs = base_rates
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    rates = [base * factor for base, factor in zip(base_rates, factors, strict=True)]
    set_logged_rates(schedule, rates)
    for group, base, rate in zip(optimizer.param_groups, base_rates, rates, strict=True):
        group["initial_lr"], group["lr"] = base, rate


def _deepspeed_schedules(trainer: transformers.Trainer) -> bool:
    """Return whether the learning rate's schedule is in DeepSpeed's own checkpoint."""
    if not trainer.is_deepspeed_enabled:
        return False
    from accelerate.utils import DeepSpeedSchedulerWrapper

    return isinstance(trainer.lr_scheduler, DeepSpeedSchedulerWrapper)


def _is_sharded(trainer: transformers.Trainer) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _random_file(trainer: transformers.Trainer, folder: str) -> Path:
    """Return the file of this worker's random state."""
    number = f"_{trainer.args.process_index}" if trainer.args.world_size > 1 else ""
    return Path(folder, f"rng_state{number}.pth")


def _save_random_state(path: Path) -> None:
    os.makedirs(path.parent, exist_ok=True)  # on another node than worker 0's
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state_all()
    torch.save(state, path)
