"""What a worker trains, whatever the command: the module, the way to its batches, and who writes its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from raybge.data.stream import StepTokenizer


@dataclass
class Learner:
    """Made in each worker by what the driver prepared: `FineTuning` or `PreTraining`.

    Args:
        model: maps a batch to the worker's share of the loss.
        backbone: the network of transformers' inside of it.
        tokenizer: from rows to batches.
        encoder: writes a checkpoint's weights, `save(folder, state_dict)`, and takes them back,
            `load_weights(folder)`; where it embeds texts, an evaluation can measure it.
    """

    model: nn.Module
    backbone: Any
    tokenizer: StepTokenizer
    encoder: Any

    def __post_init__(self) -> None:
        """What the Trainer and its helpers ask of the model they train, and find only on transformers' own."""
        model: Any = self.model
        model.config = self.backbone.config
        model.get_input_embeddings = self.backbone.get_input_embeddings
        model.activation_checkpointing_enable = self.backbone.activation_checkpointing_enable
