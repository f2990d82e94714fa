"""Spec of averaged weights: --ema, --average_checkpoints and --keep_better, checked before anything is read.

Importing this module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raybge.cli.options import LoopOptions
from raybge.util.errors import UserError
from raybge.util.plural import plural

SAVE_STEPS = 500  # of transformers.TrainingArguments


@dataclass(frozen=True)
class AveragingPlan:
    """Averages of a run's weights that its workers make.

    Args:
        ema: decay of the exponential moving average; None: no such average.
        steps: updates of the checkpoints whose mean is made; empty: no mean.
        keep_better: save the weights with the best evaluation, the last ones included; otherwise the averaged ones.
    """

    ema: float | None = None
    steps: tuple[int, ...] = ()
    keep_better: bool = False

    @property
    def requested(self) -> bool:
        """True if there is an average."""
        return self.ema is not None or bool(self.steps)


@dataclass(frozen=True)
class AveragingSpec:
    """Averages of the weights: decay of the moving average, number of checkpoints, and which weights are saved."""

    ema: float | None
    checkpoints: int | None
    keep_better: bool

    @classmethod
    def from_options(cls, options: LoopOptions) -> AveragingSpec:
        """Read and check the flags.

        Args:
            options: the command's flags.

        Returns:
            The spec.

        Raises:
            UserError: a number out of range, or flags that do not go together.
        """
        spec = cls(options.ema, options.average_checkpoints, getattr(options, "keep_better", False))
        if spec.ema is not None and not 0 < spec.ema < 1:
            raise UserError(f"--ema must be above 0 and below 1, found {spec.ema:g}; common values are 0.99 to 0.9999")
        if spec.checkpoints is not None and spec.checkpoints < 2:
            raise UserError(f"--average_checkpoints must be at least 2, found {spec.checkpoints}")
        if spec.keep_better and not (spec.flags and getattr(options, "eval_data", None)):
            raise UserError("--keep_better requires --eval_data, and --ema or --average_checkpoints")
        if len(spec.flags) == 2 and not spec.keep_better:
            raise UserError(
                "--ema and --average_checkpoints each save their own average: give one of them, or --keep_better"
            )
        if spec.flags:
            _check_trainer_flags(spec, options.training)
        return spec

    @property
    def flags(self) -> list[str]:
        """Names of the flags that request an average, with dashes."""
        values = {"--ema": self.ema, "--average_checkpoints": self.checkpoints}
        return [name for name, value in values.items() if value is not None]

    def describe(self) -> list[str]:
        """Return the plan's line on the weights that are saved, if there is an average."""
        averages = []
        if self.ema is not None:
            averages.append(f"their exponential moving average (decay {self.ema:g})")
        if self.checkpoints is not None:
            averages.append(f"the mean of the last {self.checkpoints} checkpoints")
        if not averages:
            return []
        if self.keep_better:
            return [f"weights: the last ones or {' or '.join(averages)} are saved, those with the best evaluation"]
        return [f"weights: {averages[0]} is saved"]

    def plan(self, flags: Mapping[str, Any], updates: int, updates_per_epoch: int) -> AveragingPlan:
        """Return the averages of a run of this length.

        Args:
            flags: the Trainer's flags.
            updates: updates of the run.
            updates_per_epoch: updates of an epoch.

        Returns:
            The plan.

        Raises:
            UserError: the run writes fewer checkpoints than are to be averaged.
        """
        if self.checkpoints is None:
            return AveragingPlan(self.ema, (), self.keep_better)
        steps = checkpoint_steps(flags, updates, updates_per_epoch)
        if len(steps) < self.checkpoints:
            raise UserError(
                f"--average_checkpoints {self.checkpoints}: this run of {plural(updates, 'update')} writes "
                f"{plural(len(steps), 'checkpoint')}; lower --save_steps (now {_describe_saving(flags)})"
            )
        return AveragingPlan(self.ema, tuple(steps[-self.checkpoints :]), self.keep_better)


def checkpoint_steps(flags: Mapping[str, Any], updates: int, updates_per_epoch: int) -> list[int]:
    """Return the updates after which a run saves checkpoints by its flags; a run that is stopped saves one more.

    Args:
        flags: the Trainer's flags.
        updates: updates of the run.
        updates_per_epoch: updates of an epoch.

    Returns:
        The numbers of updates, ascending; the last is `updates`.
    """
    every: float = updates_per_epoch
    if flags.get("save_strategy", "steps") == "steps":
        every = flags.get("save_steps", SAVE_STEPS)
        every = math.ceil(updates * every) if every < 1 else int(every)  # as transformers reads a share of the run
        every = max(every, 1)  # transformers refuses 0
    return sorted({*range(int(every), updates + 1, int(every)), updates})


def _describe_saving(flags: Mapping[str, Any]) -> str:
    if flags.get("save_strategy", "steps") == "steps":
        return f"{flags.get('save_steps', SAVE_STEPS):g}"
    return f"--save_strategy {flags['save_strategy']}"


def _check_trainer_flags(spec: AveragingSpec, flags: Mapping[str, Any]) -> None:
    """Raise UserError for flags of the Trainer that exclude averages."""
    name = spec.flags[0]
    if flags.get("load_best_model_at_end"):
        raise UserError(f"--load_best_model_at_end selects one checkpoint, {name} averages several: give one of them")
    if flags.get("deepspeed"):
        raise UserError(
            f"{name} is not supported with --deepspeed, which keeps the weights itself; --fsdp is supported"
        )
    if spec.checkpoints is None:
        return
    if (strategy := flags.get("save_strategy", "steps")) not in ("steps", "epoch"):
        raise UserError(f"--average_checkpoints requires --save_strategy steps or epoch, found {strategy}")
    limit = flags.get("save_total_limit")
    if limit is not None and limit < spec.checkpoints:
        raise UserError(
            f"--average_checkpoints {spec.checkpoints} requires that many checkpoints: --save_total_limit is {limit}"
        )
    if flags.get("save_only_model") and str(flags.get("fsdp") or "").lower() in ("true", "1", "yes"):
        raise UserError("--average_checkpoints reads the shards of --fsdp, which --save_only_model leaves out")
