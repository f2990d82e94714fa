"""Interfaces of what is trained: `TaskSpec` is resolved from flags in the driver, `TrainingTask` runs in workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor, nn

    from raybge.data.datasets import DataSets
    from raybge.data.jsonl import Parse
    from raybge.data.stream import StepTokenizer
    from raybge.data.survey import Survey
    from raybge.evaluation.spec import ValidationSpec


class TaskSpec(Protocol):
    """Spec of a task and its rows, checked before anything is read: `FinetuneSpec`, `PretrainSpec`."""

    command: ClassVar[str]  # name of the command, "train"
    row_noun: ClassVar[str]  # singular name of a row in messages, "group"
    model_folder: ClassVar[str]  # folder of the model inside of the output folder, "" for the output folder itself

    @classmethod
    def from_options(cls, options: Any) -> Self:
        """Read and check the command's own flags."""

    @property
    def base_model(self) -> str | None:
        """Model to start from, as it was given; None: from scratch."""

    @property
    def trained_lengths(self) -> dict[str, int]:
        """Most tokens of a text in training, special ones included, by kind of text in the plural."""

    @property
    def row_parser(self) -> Parse:
        """Function that parses and validates a row."""

    @property
    def validation(self) -> ValidationSpec | None:
        """Queries and corpus of the evaluation while training; None: no evaluation."""

    def describe(self) -> tuple[str, str]:
        """Return the plan's line on the model, and the text that follows the size of a step."""

    def check_model(self, survey: Survey) -> None:
        """Check that the model fits its tokenizer, and that this knows most words of a sample of the rows."""

    def row_notes(self, survey: Survey) -> list[str]:
        """Return lines for the plan on rows that training changes, from a sample of them."""

    def task(self, survey: Survey, data_sets: DataSets) -> TrainingTask:
        """Return the task that workers run on these rows."""


class TrainingTask(Protocol):
    """Task that workers run, made in the driver and pickled: `FinetuneTask`, `PretrainTask`."""

    @property
    def spec(self) -> TaskSpec:
        """The spec that the task was made from."""

    def build(self, args: Any) -> TaskComponents:
        """Load the model onto the device of `args`, the worker's TrainingArguments."""

    def save(self, components: TaskComponents, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
        """Write the trained model; `weights` are the whole ones if those in memory are shards."""


@dataclass
class TaskComponents:
    """Model, tokenizer and encoder of a task, built in each worker.

    Args:
        model: maps a batch to the worker's share of the loss.
        backbone: the transformers network inside of `model`.
        tokenizer: turns rows into batches.
        encoder: `save(folder, state_dict)` writes a checkpoint's weights and `load_weights(folder)` reads them; an
            encoder that embeds texts can be evaluated while training.
        messages: lines for the screen.
    """

    model: nn.Module
    backbone: Any
    tokenizer: StepTokenizer
    encoder: Any
    messages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Add the attributes that the Trainer and its helpers expect, which only transformers' own models have."""
        model: Any = self.model
        model.config = self.backbone.config
        model.get_input_embeddings = self.backbone.get_input_embeddings
        model.activation_checkpointing_enable = self.backbone.activation_checkpointing_enable
