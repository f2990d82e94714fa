"""Runs that would change nothing: few updates, or a learning rate of 0 in all of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from raybge.training.trainer_arguments import worker_flags
from raybge.training.trainer_check import undisturbed
from raybge.util.errors import UserError
from raybge.util.plural import plural

if TYPE_CHECKING:
    from raybge.training.spec import TrainerSpec

FEW_UPDATES = 20


def update_count(trainer: TrainerSpec, steps: int) -> int:
    """Return the updates of a run.

    Args:
        trainer: the Trainer's flags.
        steps: steps of an epoch.

    Returns:
        --max_steps, else the updates of --num_train_epochs.
    """
    flags = trainer.flags
    if (flags.get("max_steps") or -1) > 0:
        return int(flags["max_steps"])
    per_epoch = max(1, -(-steps // trainer.accumulation))
    return math.ceil(float(flags.get("num_train_epochs") or 3.0) * per_epoch)


def check_rates(trainer: TrainerSpec, updates: int) -> list[str]:
    """Check that the schedule gives some update of the run a learning rate above 0.

    Args:
        trainer: the Trainer's flags, which build a schedule (`trainer_check`).
        updates: updates of the run.

    Returns:
        Lines that the plan shows: a learning rate that is 0 on purpose, and a run of few updates.

    Raises:
        UserError: all rates are 0; the message states the flag and a value that works.
    """
    flags = worker_flags(trainer)
    lines = []
    if flags.get("learning_rate") == 0:
        lines.append("--learning_rate 0: the weights do not change")
    elif not _has_rate(flags, updates):
        warmup = next((name for name in ("warmup_ratio", "warmup_steps") if _value(trainer, name)), None)
        if warmup and _has_rate({**flags, "warmup_steps": 0}, updates):
            raise UserError(
                f"--{warmup} {_value(trainer, warmup):g}: the run has {plural(updates, 'update')} only, which warm up "
                f"from a learning rate of 0 and change nothing: give --{warmup} 0, or more epochs"
            )
        raise UserError(
            f"--lr_scheduler_type {flags.get('lr_scheduler_type', 'linear')}: the learning rate is 0 in "
            f"{'the only update' if updates == 1 else f'all {updates:,} updates'}: give --lr_scheduler_type constant, "
            "or more epochs"
        )
    if updates < FEW_UPDATES:
        lines.append(
            f"{plural(updates, 'update')} in all: a run of fewer than {FEW_UPDATES} changes a model little; give more "
            "epochs or a smaller batch"
        )
    return lines


def _value(trainer: TrainerSpec, name: str) -> float:
    return float(trainer.warmup_ratio if name == "warmup_ratio" else trainer.flags.get(name) or 0)


def _has_rate(flags: dict[str, Any], updates: int) -> bool:
    """Return True if an update has a learning rate above 0, in transformers' own schedule."""
    import torch
    import transformers

    names = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
    settings = {name: flags[name] for name in names if flags.get(name) is not None}
    with undisturbed():
        args = transformers.TrainingArguments(output_dir=".", use_cpu=True, **settings)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    schedule = transformers.get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        args.get_warmup_steps(updates),
        updates,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        return True  # it follows a metric
    return any(factor(update) != 0 for factor in schedule.lr_lambdas for update in range(updates))
