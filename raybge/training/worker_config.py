"""Configuration of the training workers, made in the driver from the planned run; independent of Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.data.token_cache import TokenCache
from raybge.training.averaging_spec import AveragingPlan
from raybge.training.checkpoint.manifest import RunIdentity, checkpoint_path, is_complete, load_checkpoint
from raybge.training.row_records import RowLog
from raybge.training.schedule_check import update_count
from raybge.training.trainer_arguments import training_arguments
from raybge.util.digest import fingerprint
from raybge.util.errors import UserError
from raybge.util.filesystem import last_part
from raybge.util.versions import versions

if TYPE_CHECKING:
    from raybge.cluster.resources import Plan
    from raybge.data.order import Order
    from raybge.data.survey import Survey
    from raybge.evaluation.validation_data import ValidationData
    from raybge.training.checkpoint.manifest import Checkpoint
    from raybge.training.health.run_state import RunState
    from raybge.training.spec import TrainingData, TrainingSpec
    from raybge.training.tasks.task import TrainingTask

# Takes the step of an evaluation, the last step of the run and the metrics. False: not now, call again later.
EvaluationCallback = Callable[[int, int, dict[str, float]], bool]


@dataclass(frozen=True)
class TrialContext:
    """Context that a search passes to the runs of its trials; a run of its own has the defaults.

    Args:
        on_evaluation: called with each evaluation.
        runs: number of trials that share the cluster at a time.
        tokens: folder for tokens that trials with the same rows share.
        initial_metrics: metrics of the model before training, if another trial has measured them.
    """

    on_evaluation: EvaluationCallback | None = None
    runs: int = 1
    tokens: str | None = None
    initial_metrics: Mapping[str, float] | None = None


@dataclass(frozen=True)
class PlannedRun:
    """A run before its workers start.

    Args:
        spec: its flags.
        data: its rows.
        plan: number of workers and the resources of each.
        reading_cpus: CPUs of each worker's reading.
        start: checkpoint to continue from; None: from the beginning.
        context: of the search whose trial it is.
        reads_in_process: workers read their rows themselves instead of by Ray Data.
    """

    spec: TrainingSpec
    data: TrainingData
    plan: Plan
    reading_cpus: float
    start: Checkpoint | None
    context: TrialContext
    reads_in_process: bool = False

    def averaging(self) -> AveragingPlan:
        """Return the averages of the weights; UserError if the run does not have the checkpoints for them."""
        trainer, steps = self.spec.trainer, self.data.order.steps
        per_epoch = max(1, -(-steps // trainer.accumulation))
        plan = self.spec.averaging.plan(trainer.flags, update_count(trainer, steps), per_epoch)
        storage = self.spec.run.storage
        earlier = [step for step in plan.steps if self.start and step <= self.start.step]
        if lost := [step for step in earlier if not is_complete(checkpoint_path(storage, step))]:
            raise UserError(
                f"--average_checkpoints {len(plan.steps)}: the run to continue has no checkpoint of update {lost[0]:,} "
                f"in {storage}; lower it, or use --save_steps and --save_total_limit of that run"
            )
        return plan


@dataclass(frozen=True, repr=False)  # Ray Train shows str() of it on the dashboard: no token may be in it
class WorkerConfig:
    """Configuration of a worker. Paths are absolute: a worker's current folder is Ray's.

    Args:
        task: builds and saves the model.
        training: keyword arguments of TrainingArguments.
        survey: files and rows.
        order: rows of each step.
        output_dir: folder of the result.
        markers: files that exist while the driver runs, on the folders that all nodes must share.
        cpus: threads of the worker.
        reading_cpus: CPUs of its reading.
        logging_dir: TensorBoard's folder.
        run_state: connection to the driver.
        identity: written into each checkpoint.
        validation: queries and corpus of the evaluation while training.
        resume_from: complete checkpoint to continue from.
        card: arguments of TrainingCard that are known before training.
        flags: flags that are not at their defaults, for the report; no secrets.
        token_cache: tokens that other runs share.
        initial_metrics: what `validation` measures before training, if known.
        row_log: where the rows of each step are recorded.
        max_bad_steps: consecutive steps that are not finite which end the run; 0: off.
        storage: folder or URI of the checkpoints; None: `output_dir` of `training`.
        stall_timeout: seconds that workers wait for a missing one; 0: off.
        reads_in_process: workers read their rows themselves instead of by Ray Data.
        averaging: averages of the weights.
    """

    task: TrainingTask
    training: dict[str, Any]
    survey: Survey
    order: Order
    output_dir: str
    markers: tuple[str, ...]
    cpus: int
    reading_cpus: float
    logging_dir: str | None
    run_state: RunState
    identity: RunIdentity
    validation: ValidationData | None = None
    resume_from: str | None = None
    card: dict[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    token_cache: TokenCache | None = None
    initial_metrics: Mapping[str, float] | None = None
    row_log: RowLog | None = None
    max_bad_steps: int = 0
    storage: str | None = None
    stall_timeout: float = 0.0
    reads_in_process: bool = False
    averaging: AveragingPlan = AveragingPlan()

    def for_attempt(self, workers: int, reading_cpus: float, resume_from: str | None) -> WorkerConfig:
        """Make the configuration of an attempt: shares of the same global batch, and a row record of its own.

        Args:
            workers: workers of the attempt.
            reading_cpus: CPUs of each worker's reading.
            resume_from: complete checkpoint to continue from; None: from the beginning.

        Returns:
            The configuration, equal for all workers.
        """
        row_log = self.row_log
        if row_log:
            first_update = load_checkpoint(resume_from, "--storage_path").step if resume_from else 0
            row_log = row_log.begin(first_update, workers)
        share = -(-self.order.global_batch // workers)
        training = {**self.training, "per_device_train_batch_size": share}
        return replace(self, training=training, reading_cpus=reading_cpus, resume_from=resume_from, row_log=row_log)

    @classmethod
    def of(cls, planned: PlannedRun, markers: Sequence[Path], run_state: RunState) -> WorkerConfig:
        """Make the configuration of a run's first workers; reads the data of the evaluation.

        Args:
            planned: the run.
            markers: files that exist while the driver runs.
            run_state: connection to the driver.

        Returns:
            The configuration, equal for all workers.

        Raises:
            UserError: flags that this plan cannot follow, rows of the evaluation that cannot be used, or a checkpoint
                of another run.
        """
        from raybge.evaluation.validation_data import prepare

        spec, data, plan, context = planned.spec, planned.data, planned.plan, planned.context
        run, survey, order = spec.run, data.survey, data.order
        task = spec.task.task(survey, data.data_sets)
        identity = RunIdentity.of(survey, order, spec.trainer.accumulation)
        validation = prepare(spec.task.validation, run.work)
        tokens = context.tokens and TokenCache(os.path.join(context.tokens, fingerprint((identity, validation))))
        training = training_arguments(spec.trainer, plan, order, run.work)
        if planned.start:
            planned.start.check(identity)
        return cls(
            task=task,
            training=training,
            survey=survey,
            order=order,
            output_dir=str(run.output),
            markers=tuple(map(str, markers)),
            cpus=plan.cpus,
            reading_cpus=planned.reading_cpus,
            logging_dir=run.logging_dir,
            run_state=run_state,
            identity=identity,
            validation=validation,
            resume_from=planned.start.path if planned.start else None,
            card=_card(planned, validation),
            flags=run.flags,
            token_cache=tokens or None,
            initial_metrics=context.initial_metrics,
            row_log=RowLog.of(run.output, survey, order) if run.log_rows else None,
            max_bad_steps=run.max_bad_steps,
            storage=run.storage,
            stall_timeout=run.stall_timeout,
            reads_in_process=planned.reads_in_process,
            averaging=planned.averaging(),
        )


def _card(planned: PlannedRun, validation: ValidationData | None) -> dict[str, Any]:
    """Return the fields of the model card that are known before training; no secrets."""
    from raybge.model.training_card import HeldOutData

    spec, data = planned.spec, planned.data
    # A run that continues has chosen its global batch.
    chosen = {"global_batch_size": data.order.global_batch} if planned.start else {}
    held_out = None
    if validation:
        names = [last_part(name) for name in validation.queries.rows_by_file()]
        passages = validation.corpus.total_rows if validation.corpus else None
        held_out = HeldOutData(", ".join(names), validation.queries.total_rows, passages)
    return dict(
        base=spec.card.base,
        license=spec.card.license,
        languages=spec.card.languages,
        data=list(data.survey.rows_by_file().items()),
        flags={**spec.card.flags, **chosen},
        hyperparameters={**spec.card.hyperparameters, "global_batch_size": data.order.global_batch},
        versions=versions("transformers", "torch", "ray"),
        command=spec.task.command,
        held_out=held_out,
    )
