"""The message of a training step for which a GPU's memory is too small."""

from __future__ import annotations

from typing import Any

from torch import nn

from raybge.losses.contrastive_model import ContrastiveModel
from raybge.util.errors import UserError, first_line
from raybge.util.plural import plural


def out_of_memory(model: nn.Module, batch: Any, step: int, error: BaseException) -> UserError:
    """Return the error of a step, with the largest chunk of texts and the flag that makes it smaller.

    Args:
        model: the trained model.
        batch: its last batch, None before the first step.
        step: number of the step.
        error: torch's error.

    Returns:
        The error to raise.
    """
    if isinstance(model, ContrastiveModel) and batch is not None:
        texts, tokens = model.largest_chunk(batch)
        where = f" in step {step:,}, whose largest chunk has {plural(texts, 'text')} of up to {plural(tokens, 'token')}"
        smaller = min(texts, model.sub_batch_size or texts) // 2
        remedy = f"--sub_batch_size {smaller} or less" if smaller else "a lower --passage_max_len"
        if smaller and model.sub_batch_tokens:
            remedy = f"--sub_batch_tokens {smaller * tokens} or less"
    else:
        where = f" in step {step:,}"
        remedy = "a lower --per_device_train_batch_size"
    return UserError(
        f"the GPU's memory ran out{where}: give {remedy}, or --gradient_checkpointing True ({first_line(error)})"
    )
