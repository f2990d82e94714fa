"""Specs of a training run: which task, data, batch, Trainer flags, folders and scale, resolved once from the flags.

    spec = TrainingSpec.from_options(options, FinetuneSpec)

Only the constructors here and in `tasks/finetune_spec.py` and `tasks/pretrain_spec.py` read an options object, and they
check it. Importing this module imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.cli.checks import check_at_least
from raybge.cli.options import LoopOptions
from raybge.cli.parser import changed_values
from raybge.cluster.spec import ScaleSpec
from raybge.training.averaging_spec import AveragingSpec
from raybge.training.card_spec import CardSpec
from raybge.training.checkpoint.manifest import resume_requested
from raybge.training.similarity_spec import SimilaritySpec
from raybge.training.trainer_arguments import check_trainer_flags
from raybge.util.errors import UserError
from raybge.util.filesystem import STATE_FOLDER, filesystem, is_local
from raybge.util.redaction import redact

if TYPE_CHECKING:
    from raybge.data.datasets import DataSets
    from raybge.data.order import Order
    from raybge.data.source_files import SourceFile
    from raybge.data.survey import Survey
    from raybge.training.checkpoint.manifest import Checkpoint
    from raybge.training.tasks.task import TaskSpec


def device_batch_of(options: LoopOptions) -> int:
    """Return --per_device_train_batch_size."""
    return int(options.training.get("per_device_train_batch_size", 8))


def data_seed_of(options: LoopOptions) -> int:
    """Return the seed of the order of rows and of the draws: --data_seed, or --seed if that is unset."""
    data_seed = options.training.get("data_seed")
    return int(options.training.get("seed", 42) if data_seed is None else data_seed)


@dataclass(frozen=True)
class TrainingData:
    """Rows of a run: the surveyed files, their data sets and the order in which they are trained."""

    survey: Survey
    data_sets: DataSets
    order: Order


@dataclass(frozen=True)
class DataSpec:
    """Rows to train on and their order.

    Args:
        train_data: files, folders or globs.
        on_bad_rows: "stop" or "skip".
        any_text: --accept_any_text, see `SourceFile`.
        max_examples: rows used of each file.
        small_threshold: files of a folder with fewer rows are joined into one data set.
        drop_threshold: joined data sets with fewer rows are left out.
        weights: how often an epoch has each row, by file or folder; 1 for all others.
        together: all rows of a step come from one data set.
        drop_last: leave out the last step of a sequence of rows if it is not full.
        seed: seed of the order.
    """

    train_data: tuple[str, ...]
    on_bad_rows: str
    any_text: bool
    max_examples: int
    small_threshold: int
    drop_threshold: int
    weights: Mapping[str, float]
    together: bool
    drop_last: bool
    seed: int

    @classmethod
    def from_options(cls, options: LoopOptions) -> DataSpec:
        """Read and check the flags of the data.

        Args:
            options: the command's flags.

        Returns:
            The spec.

        Raises:
            UserError: a number out of range, or a weight that is not NAME=WEIGHT.
        """
        from raybge.data.datasets import parse_weights

        if data_seed_of(options) < 0 or options.training.get("seed", 0) < 0:
            raise UserError("--seed and --data_seed must be at least 0")
        check_at_least(1, options, "max_example_num_per_dataset")
        check_at_least(0, options, "small_threshold", "drop_threshold")
        return cls(
            train_data=tuple(options.train_data),
            on_bad_rows=options.on_bad_rows,
            any_text=options.accept_any_text,
            max_examples=options.max_example_num_per_dataset,
            small_threshold=options.small_threshold,
            drop_threshold=options.drop_threshold,
            weights=parse_weights(options.dataset_weights or []),
            together=options.same_dataset_within_batch,
            drop_last=options.training.get("dataloader_drop_last", False),
            seed=data_seed_of(options),
        )

    def arrange(self, survey: Survey, global_batch: int, workers: int) -> TrainingData:
        """Arrange surveyed rows into data sets and order them.

        Args:
            survey: the rows of `train_data`.
            global_batch: rows of one step over all workers.
            workers: workers that share a step.

        Returns:
            Survey, data sets and order.

        Raises:
            UserError: more workers than can share a step, or no step is left.
        """
        from raybge.data.datasets import build_data_sets
        from raybge.data.order import Order, window_rows

        data_sets = build_data_sets(
            survey, self.max_examples, self.small_threshold, self.drop_threshold, self.weights, self.together
        )
        window = window_rows(sum(file.size for file in survey.files), survey.total_rows)
        order = Order(survey.rows, global_batch, self.seed, self.drop_last, data_sets.mixture, window)
        order.owned(0, workers)
        if not order.steps:
            raise UserError(
                f"{order.total:,} rows are less than one global batch of {global_batch:,}, and --dataloader_drop_last "
                "leaves out steps that are not full"
            )
        return TrainingData(survey, data_sets, order)


@dataclass(frozen=True)
class BatchSpec:
    """Rows of one step: --global_batch_size, None if unset, and --per_device_train_batch_size."""

    global_size: int | None
    per_device: int

    @classmethod
    def from_options(cls, options: LoopOptions) -> BatchSpec:
        """Read and check both batch sizes.

        Args:
            options: the command's flags.

        Returns:
            The spec.

        Raises:
            UserError: a size below 1.
        """
        spec = cls(options.global_batch_size, device_batch_of(options))
        for name, value in (("global_batch_size", spec.global_size), ("per_device_train_batch_size", spec.per_device)):
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, found {value}")
        return spec

    def global_batch(self, workers: int, start: Checkpoint | None) -> int:
        """Return the rows of one step over all workers.

        A run that continues keeps its global batch, on which the objective depends, with another number of workers.

        Args:
            workers: workers at the start of the run.
            start: checkpoint to continue from; None: the run begins.

        Returns:
            The global batch.
        """
        continued = start.identity.global_batch if start else None
        return self.global_size or continued or self.per_device * workers


@dataclass(frozen=True)
class TrainerSpec:
    """Flags of the Trainer.

    Args:
        flags: flags of `transformers.TrainingArguments` that were given, by name.
        warmup_ratio: share of the steps over which the learning rate rises; transformers 5 has no such argument.
    """

    flags: Mapping[str, Any]
    warmup_ratio: float

    @classmethod
    def from_options(cls, options: LoopOptions) -> TrainerSpec:
        """Read and check the Trainer's flags.

        Args:
            options: the command's flags.

        Returns:
            The spec.

        Raises:
            UserError: a flag out of range, without effect here, or that does not go together with another one.
        """
        has_eval_data = bool(getattr(options, "eval_data", None))
        check_trainer_flags(options.training, options.warmup_ratio, has_eval_data)
        return cls(options.training, options.warmup_ratio)

    @property
    def accumulation(self) -> int:
        """Steps of the stream that make one update."""
        return int(self.flags.get("gradient_accumulation_steps", 1))


@dataclass(frozen=True)
class RunSpec:
    """Folders of a run and what it does about failures.

    Args:
        output_dir: the output folder as it was given.
        output: its absolute path.
        storage: folder or URI of the checkpoints.
        work: folder on the nodes' shared file system for the run's own files.
        cache: folder there for the survey of the rows and for decompressed files.
        resume: continue the run of this output folder.
        overwrite: train into an output folder that is not empty.
        dry_run: print the plan and stop.
        max_failures: restarts after a lost worker; -1 for no limit.
        stall_timeout: seconds that workers wait for a missing one; 0: off.
        max_bad_steps: consecutive steps that are not finite which end the run; 0: off.
        log_rows: record which rows each step trained.
        logging_dir: absolute path of TensorBoard's folder.
        flags: flags that are not at their defaults, without secrets.
    """

    output_dir: str
    output: Path
    storage: str
    work: Path
    cache: Path
    resume: bool
    overwrite: bool
    dry_run: bool
    max_failures: int
    stall_timeout: float
    max_bad_steps: int
    log_rows: bool
    logging_dir: str | None
    flags: Mapping[str, Any]

    @classmethod
    def from_options(cls, options: LoopOptions) -> RunSpec:
        """Read and check the flags of the run; its folders are not looked at yet.

        Args:
            options: the command's flags.

        Returns:
            The spec.

        Raises:
            UserError: a number out of range, an output folder that is a URI, or a storage of an unknown kind.
        """
        output_dir = options.training["output_dir"]
        if "://" in output_dir:
            raise UserError(
                f"--output_dir {output_dir}: a model is written into a folder, which all nodes share; checkpoints may "
                "go to a URI, --storage_path"
            )
        for name, least, meaning in (
            ("max_failures", -1, "no limit"),
            ("stall_timeout", 0, "off"),
            ("max_bad_steps", 0, "off"),
        ):
            if getattr(options, name) < least:
                raise UserError(f"--{name} must be at least {least} ({meaning}), found {getattr(options, name)}")
        output = Path(os.path.abspath(output_dir))
        storage = options.storage_path or output_dir
        is_folder = is_local(storage, "--storage_path")
        if is_folder:
            storage = os.path.abspath(filesystem(storage)[1])
        work = Path(storage) if is_folder else output
        cache = options.cache_path or str(work / STATE_FOLDER)
        if not is_local(cache, "--cache_path"):
            raise UserError(f"--cache_path {redact(cache)}: give a folder that all nodes share, not a URI")
        return cls(
            output_dir=output_dir,
            output=output,
            storage=storage,
            work=work,
            cache=Path(os.path.abspath(filesystem(cache)[1])),
            resume=resume_requested(options.training, options.resume),
            overwrite=options.overwrite_output_dir,
            dry_run=options.dry_run,
            max_failures=options.max_failures,
            stall_timeout=options.stall_timeout,
            max_bad_steps=options.max_bad_steps,
            log_rows=options.log_rows,
            logging_dir=os.path.abspath(options.logging_dir) if options.logging_dir else None,
            flags=changed_values(options),
        )


@dataclass(frozen=True)
class InputPaths:
    """Paths that every node reads in addition to the rows to train on, by the name of their flag."""

    data: Mapping[str, Sequence[str]]
    models: Mapping[str, str | None]

    @classmethod
    def from_options(cls, options: LoopOptions) -> InputPaths:
        """Read the paths as they were given."""
        models = ("model_name_or_path", "config_name", "tokenizer_name", "guide_model", "batch_vectors")
        return cls(
            {name: tuple(getattr(options, name, None) or ()) for name in ("eval_data", "eval_corpus")},
            {name: getattr(options, name, None) for name in models},
        )

    def by_flag(self, train_files: Sequence[SourceFile]) -> dict[str, list[str | None]]:
        """List the paths of all files and models.

        Args:
            train_files: files of --train_data.

        Returns:
            Paths and names by flag, those of --train_data included; None for an unset model.

        Raises:
            UserError: a path of the evaluation's data without a file.
        """
        from raybge.data.source_files import list_files

        paths: dict[str, list[str | None]] = {"--train_data": [file.path for file in train_files]}
        for name, places in self.data.items():
            paths[f"--{name}"] = [file.path for file in list_files(places, f"--{name}")] if places else []
        return paths | {f"--{name}": [model] for name, model in self.models.items()}


@dataclass(frozen=True)
class TrainingSpec:
    """All flags of a training run, checked."""

    task: TaskSpec
    data: DataSpec
    batch: BatchSpec
    trainer: TrainerSpec
    run: RunSpec
    inputs: InputPaths
    scale: ScaleSpec
    card: CardSpec
    averaging: AveragingSpec
    similarity: SimilaritySpec | None = None

    @classmethod
    def from_options(cls, options: LoopOptions, task: type[TaskSpec]) -> TrainingSpec:
        """Read and check the flags of a command that trains.

        Args:
            options: the command's flags.
            task: spec of what is trained: `FinetuneSpec` or `PretrainSpec`.

        Returns:
            The spec.

        Raises:
            UserError: the first flag that is wrong, with the accepted values.
        """
        scale = ScaleSpec.from_options(options)
        return cls(
            task=task.from_options(options),
            run=RunSpec.from_options(options),
            data=DataSpec.from_options(options),
            batch=BatchSpec.from_options(options),
            trainer=TrainerSpec.from_options(options),
            inputs=InputPaths.from_options(options),
            scale=replace(scale, use_gpu=False) if options.training.get("use_cpu") else scale,
            card=CardSpec.from_options(options),
            averaging=AveragingSpec.from_options(options),
            similarity=SimilaritySpec.from_options(options),
        )
