"""Parts of transformers without a stability promise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def attention_implementation(model: Any) -> str | None:
    """Return the name of the attention that a transformers model uses ("sdpa", "eager", ...).

    `set_attn_implementation` is public, reading the current value is not. None if it is unknown: texts are then padded.
    """
    name: str | None = getattr(model.config, "_attn_implementation", None)
    return name


def learning_rate(trainer: Any) -> float:
    """Return the learning rate of a Trainer's next step.

    Depends on the scheduler and on DeepSpeed; the Trainer logs the value of this private method. If transformers has
    changed, it is the value of the scheduler.
    """
    method = getattr(trainer, "_get_learning_rate", None)
    return float(method() if method else trainer.lr_scheduler.get_last_lr()[0])


@contextmanager
def preserve_accelerate_state() -> Iterator[None]:
    """Restore accelerate's state of the process at the end of the block.

    TrainingArguments reset it, as is right in a worker. In another process it may belong to the program that calls
    raybge. It is a dictionary per class, which has no public name.
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState

    shared = [getattr(kind, "_shared_state", {}) for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(each) for each in shared]
    try:
        yield
    finally:
        for each, values in zip(shared, before, strict=True):
            each.clear()
            each.update(values)
