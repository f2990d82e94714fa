"""What each training worker is told: the flags, the rows and the plan, made into one value.

Made in the driver, read in the workers; it knows nothing of Ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from raybge.cli.options import LoopOptions, TrainOptions
from raybge.cli.parser import given
from raybge.data.token_cache import TokenFiles
from raybge.training.checkpoint.manifest import Identity, digest
from raybge.training.row_records import RowLog
from raybge.training.trainer_arguments import accumulation, training_arguments
from raybge.util.versions import versions

if TYPE_CHECKING:
    from torch import Tensor

    from raybge.cluster.resources import Plan
    from raybge.data.datasets import DataSets
    from raybge.data.jsonl import Parse
    from raybge.data.order import Order
    from raybge.data.source_files import SourceFile
    from raybge.data.survey import Survey
    from raybge.evaluation.eval_data import ValidationConfig
    from raybge.training.health.run_state import Board
    from raybge.training.tasks.task import Learner


class Learning(Protocol):
    """What a run trains, and on what rows: `FineTuning`, `PreTraining`. Made in the driver of the command's flags."""

    command: ClassVar[str]
    rows: ClassVar[str]  # what a row is called, "groups"
    folder: ClassVar[str]  # of the output folder, where the model goes

    @staticmethod
    def check(arguments: Any) -> None:
        """UserError for what is wrong with the flags that are the command's own."""

    @staticmethod
    def parse(arguments: Any) -> Parse:
        """What a row must be."""

    @staticmethod
    def inputs(arguments: Any, files: Sequence[SourceFile]) -> dict[str, list[str | None]]:
        """What every worker reads, by flag."""

    @staticmethod
    def describe(arguments: Any) -> tuple[str, str]:
        """The plan's line on the model, and what it says behind the size of a step."""

    @classmethod
    def of(cls, arguments: Any, survey: Survey) -> Self:
        """What the flags say of training on these rows."""

    def learner(self, args: Any) -> Learner:
        """Load the model, in a worker, onto the device of its TrainingArguments."""

    def save(self, learner: Learner, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
        """Write the trained model; `weights` where those in memory are shards."""


# Takes the step of an evaluation, the last step there will be, and the metrics; False: tell me again, I cannot yet.
OnMeasured = Callable[[int, int, dict[str, float]], bool]


@dataclass(frozen=True)
class TrialContext:
    """What a run is told by the search whose trial it is; a run by itself is told nothing.

    Args:
        on_measured: hears of each evaluation.
        runs: trials at a time, which share the cluster.
        tokens: folder for tokens that trials with the same rows share.
        before: what the model measures before training.
    """

    on_measured: OnMeasured | None = None
    runs: int = 1
    tokens: str | None = None
    before: Mapping[str, float] | None = None


@dataclass(frozen=True, repr=False)  # Ray Train keeps what str() makes of it, for the dashboard: no token may be in it
class WorkerConfig:
    """What a worker needs to know, prepared by the driver.

    `learning` makes what is trained, `training` are TrainingArguments, `card` those of Card that the run does not find
    out. `resume_from` is a whole checkpoint. Paths are absolute: a worker's current folder is Ray's. `kept` are tokens
    that other runs share, `before` is what `validation` finds of the model before training where that is known.
    `row_log` is where steps' rows are written down.
    `storage` is where checkpoints lie, a folder or a URI; None: in the `output_dir` of `training`.
    """

    learning: Learning
    training: dict[str, Any]
    survey: Survey
    order: Order
    output_dir: str
    markers: tuple[str, ...]
    cpus: int
    reading_cpus: float
    logging_dir: str | None
    board: Board
    identity: Identity
    validation: ValidationConfig | None = None
    resume_from: str | None = None
    card: dict[str, Any] = field(default_factory=dict)
    kept: TokenFiles | None = None
    before: Mapping[str, float] | None = None
    row_log: RowLog | None = None
    max_bad_steps: int = 0
    storage: str | None = None
    stall_timeout: float = 0.0


def worker_config(
    arguments: LoopOptions,
    learning: Learning,
    plan: Plan,
    reading: float,
    survey: Survey,
    order: Order,
    output: Path,
    storage: Path,
    markers: tuple[Path, ...],
    board: Board,
    context: TrialContext,
) -> WorkerConfig:
    from raybge.evaluation.eval_data import prepare

    identity = Identity.of(survey, order, accumulation(arguments))
    validation = prepare(arguments, storage) if isinstance(arguments, TrainOptions) else None
    kept = context.tokens and TokenFiles(os.path.join(context.tokens, digest((identity, validation))))
    return WorkerConfig(
        learning=learning,
        training=training_arguments(arguments, plan, order, storage),
        survey=survey,
        order=order,
        output_dir=str(output),
        markers=tuple(map(str, markers)),
        cpus=plan.cpus,
        reading_cpus=reading,
        logging_dir=os.path.abspath(arguments.logging_dir) if arguments.logging_dir else None,
        board=board,
        identity=identity,
        validation=validation,
        kept=kept or None,
        before=context.before,
        row_log=RowLog.of(output, survey, order) if arguments.log_rows else None,
        max_bad_steps=arguments.max_bad_steps,
        stall_timeout=arguments.stall_timeout,
        card={**_card(arguments, survey), "command": learning.command},
    )


def data_sets_of(arguments: LoopOptions, survey: Survey) -> DataSets:
    from raybge.data.datasets import arrange, parse_weights

    return arrange(
        survey,
        arguments.max_example_num_per_dataset,
        arguments.small_threshold,
        arguments.drop_threshold,
        parse_weights(arguments.dataset_weights or []),
        arguments.same_dataset_within_batch,
    )


def device_batch_of(arguments: LoopOptions) -> int:
    return arguments.training.get("per_device_train_batch_size", 8)


def seed_of(arguments: LoopOptions) -> int:
    data_seed = arguments.training.get("data_seed")
    return arguments.training.get("seed", 42) if data_seed is None else data_seed


def _card(arguments: LoopOptions, survey: Survey) -> dict[str, Any]:
    """What the model card says of the run before it starts; secrets stay out of it."""
    return dict(
        base_model=arguments.model_name_or_path,
        data=list(survey.rows_by_file().items()),
        flags=given(arguments),
        versions=versions("transformers", "torch", "ray"),
    )
