"""A training run from its flags to its result: check, read, plan, train, report.

`raybge.train` and `raybge.pretrain` differ in the spec of their task: `FinetuneSpec` and `PretrainSpec`.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from raybge.cli.console import Console
from raybge.cli.options import LoopOptions, PretrainOptions, TrainOptions
from raybge.cluster.autoscaling import wait_for_capacity
from raybge.cluster.connection import joins_cluster
from raybge.cluster.resources import reading_cpus
from raybge.cluster.shared_paths import check_shared
from raybge.model.upload import upload_command, upload_obstacle
from raybge.report.page import REPORT
from raybge.training import row_records
from raybge.training.checkpoint.final_model import RESULTS, finished_metrics
from raybge.training.checkpoint.manifest import (
    check_writable,
    delete_checkpoint,
    list_checkpoints,
    resume_checkpoint,
)
from raybge.training.elastic import ElasticPolicy, limit_to_lanes
from raybge.training.ray_runtime import RayRuntime
from raybge.training.schedule_check import check_rates, update_count
from raybge.training.similar_batches import with_similar_batches
from raybge.training.spec import RunSpec, TrainingSpec
from raybge.training.tasks.finetune_spec import FinetuneSpec
from raybge.training.tasks.pretrain_spec import PretrainSpec
from raybge.training.trainer_arguments import process_group
from raybge.training.trainer_check import check_trainer
from raybge.training.training_result import TrainingResult
from raybge.training.worker_config import PlannedRun, TrialContext, WorkerConfig
from raybge.util.errors import UserError
from raybge.util.filesystem import STATE_FOLDER
from raybge.util.plural import plural, plural_noun
from raybge.util.redaction import redact
from raybge.util.retry import QUICK, WAITS, with_retries
from raybge.util.text_format import format_duration

if TYPE_CHECKING:
    from raybge.data.source_files import SourceFile
    from raybge.data.survey import Survey
    from raybge.training.runtime import Runtime
    from raybge.training.tasks.task import TaskSpec

# Where workers run; tests replace it to start them without Ray.
RUNTIME: Callable[[], Runtime] = RayRuntime


def train(options: TrainOptions, console: Console, context: TrialContext | None = None) -> TrainingResult:
    """Fine-tune a model.

    Args:
        options: flags of `raybge.train`.
        console: shows the plan and the progress.
        context: passed by a search to the runs of its trials.

    Returns:
        The model's folder, the metrics and the report; empty with --dry_run.

    Raises:
        UserError: before any model loads, flags, files or rows that cannot be used.
    """
    return run(options, FinetuneSpec, console, context or TrialContext())


def pretrain(options: PretrainOptions, console: Console) -> TrainingResult:
    """Pre-train an encoder; see `train`."""
    return run(options, PretrainSpec, console, TrialContext())


def run(options: LoopOptions, task: type[TaskSpec], console: Console, context: TrialContext) -> TrainingResult:
    """Train what `task` reads from the options; see `train`."""
    from raybge.data.order import lane_count
    from raybge.data.source_files import list_files
    from raybge.data.survey import IN_PROCESS_BYTES, skipped_rows_message

    spec = TrainingSpec.from_options(options, task)
    _check_output(spec)
    if spec.run.resume and (metrics := finished_metrics(spec.run.output)):
        console.info(f"nothing to continue: the run of {spec.run.output} is finished")
        return TrainingResult.of(spec, metrics)
    start = resume_checkpoint(dict(spec.trainer.flags), spec.run.resume, spec.run.storage)

    files = list_files(spec.data.train_data, "--train_data", spec.data.any_text)
    # Small data is read before Ray starts, so that its errors are reported at once.
    survey = _survey(spec, files, console) if sum(file.size for file in files) <= IN_PROCESS_BYTES else None

    scale = spec.scale
    check_trainer(spec.trainer, joins_cluster=joins_cluster(scale.address))
    wanted = scale.num_workers, scale.use_gpu, scale.cpus_per_worker
    runtime = RUNTIME()
    with runtime.connect(scale, console) as cluster:
        cluster = wait_for_capacity(cluster, *wanted, console.info, elastic=True)
        written = {"--output_dir": str(spec.run.output), "--storage_path": spec.run.storage}
        written["--cache_path"] = str(spec.run.cache)
        check_shared(cluster, written, spec.inputs.by_flag(files))
        plan = scale.plan(cluster, elastic=True)
        global_batch = spec.batch.global_batch(plan.workers, start)
        plan = limit_to_lanes(plan, lane_count(global_batch), console.info)
        survey = survey or _survey(spec, files, console)
        if survey.bad_count:
            console.info(skipped_rows_message(survey, "--train_data"))
        data = spec.data.arrange(survey, global_batch, plan.workers)
        # A GPU needs tokens faster than one thread makes them, and other machines have cores to read with.
        few = sum(file.size for file in survey.files) <= IN_PROCESS_BYTES and cluster.own and not plan.gpus
        planned = PlannedRun(spec, data, plan, reading_cpus(cluster, plan, context.runs), start, context, few)
        warnings = check_rates(spec.trainer, update_count(spec.trainer, data.order.steps))
        console.info(f"cluster: {cluster.describe()}; {plan.describe('training worker')}")
        for line in (*_description(planned), *spec.task.row_notes(survey), *warnings):
            console.info(line)
        metrics = _launch(with_similar_batches(planned, console), runtime, console)
    if metrics:
        _summarize(spec, metrics, console)
    return TrainingResult.of(spec, metrics)


# --- check ------------------------------------------------------------------------------------------------------------


def _check_output(spec: TrainingSpec) -> None:
    """Raise UserError if the run must not write into its output folder or its storage."""
    run, output, model = spec.run, spec.run.output, spec.task.base_model
    if run.overwrite and run.resume:
        raise UserError("--overwrite_output_dir removes the run that --resume continues: give one of them")
    if model and run.overwrite and output in Path(os.path.abspath(model)).parents:
        raise UserError(f"--model_name_or_path {model} is inside of the --output_dir that would be overwritten")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file")
    if not run.resume and not run.overwrite and run.storage != str(output) and _checkpoints(run):
        raise UserError(
            f"--storage_path {run.storage} holds checkpoints of another run; choose another, or add "
            "--overwrite_output_dir, or --resume to continue that run"
        )
    if not output.exists() or run.overwrite or all(path.name == STATE_FOLDER for path in output.iterdir()):
        return
    if not run.resume:
        raise UserError(
            f"--output_dir {output} is not empty; choose another, or add --overwrite_output_dir, or --resume to "
            "continue its run"
        )
    if not (output / STATE_FOLDER).is_dir():
        raise UserError(f"--output_dir {output} is not empty, and there is no run in it to continue")


def _checkpoints(run: RunSpec) -> list[str]:
    return with_retries(
        lambda: list_checkpoints(run.storage), f"--storage_path: {run.storage} cannot be read", WAITS[:QUICK]
    )


# --- read -------------------------------------------------------------------------------------------------------------


def _survey(spec: TrainingSpec, files: Sequence[SourceFile], console: Console) -> Survey:
    """Count and check every row, and check the model on a sample of them.

    Files that cannot be read from the middle are written out plain once.
    """
    from raybge.data.order import block_bytes
    from raybge.data.survey import survey
    from raybge.data.transcode import UNPACK, transcode

    cache = str(spec.run.cache)
    with console.phase("checking the rows"):
        # Parquet too: a row group, often a million rows, would be read for each of its rows' windows.
        files = transcode(files, f"{cache}/data", tuple(UNPACK))
        size = block_bytes(sum(file.size for file in files))
        rows = survey(files, size, spec.task.row_parser, spec.data.on_bad_rows, cache_dir=cache)
    with console.phase("checking the model"):
        spec.task.check_model(rows)
    return rows


# --- plan -------------------------------------------------------------------------------------------------------------


def _description(planned: PlannedRun) -> Iterator[str]:
    """Yield the plan's lines on model, data, precision and start."""
    spec, order, survey = planned.spec, planned.data.order, planned.data.survey
    row, files = spec.task.row_noun, len(survey.files)
    model, step = spec.task.describe()
    yield model
    yield (
        f"data: {plural(order.total, row)} an epoch from {plural(files, 'file')}; "
        f"{plural(order.steps, 'step')} an epoch of {plural(order.global_batch, row)}{step}"
    )
    yield from planned.data.data_sets.describe(survey, order)
    if spec.similarity:
        yield spec.similarity.describe(order)
    yield from spec.averaging.describe()
    if spec.trainer.flags.get("fp16") and not planned.plan.gpus:
        yield "--fp16 is off: there is no GPU, and fp16 gains nothing on a CPU; --bf16 does on some"
    if planned.start:
        done = "1 update is" if planned.start.step == 1 else f"{planned.start.step:,} updates are"
        yield f"continues from {redact(planned.start.path)}: {done} done"
    elif spec.run.resume:
        yield "nothing to continue: there is no complete checkpoint, the run starts from the beginning"


# --- train ------------------------------------------------------------------------------------------------------------


def _launch(planned: PlannedRun, runtime: Runtime, console: Console) -> dict[str, float]:
    """Train and return the metrics; none with --dry_run."""
    from raybge.training.controller import TrainingController

    run, plan, context = planned.spec.run, planned.plan, planned.context
    check_writable(run.storage)
    name = f"run-{uuid.uuid4().hex}"
    with _markers(run, name) as markers:
        with console.phase("preparing the run"):
            config = WorkerConfig.of(planned, markers, runtime.create_run_state())
        group = process_group(planned.spec.trainer.flags, plan)
        for line in config.validation.lines() if config.validation else []:
            console.info(line)
        if run.dry_run:
            return {}
        _remove_previous_run(run)
        elastic = ElasticPolicy(*plan.range, run.storage, context.runs) if plan.range else None
        records = run.work / STATE_FOLDER / f"ray-{name}"
        try:
            return TrainingController(
                config, plan, group, run.storage, records, runtime, run.max_failures, context.on_evaluation, elastic
            ).run(console)
        finally:
            shutil.rmtree(records, ignore_errors=True)


@contextmanager
def _markers(run: RunSpec, name: str) -> Iterator[tuple[Path, ...]]:
    """Create a file on each folder that all nodes must share; workers check that they see it while the run lasts."""
    markers = (run.output / STATE_FOLDER / name, run.work / STATE_FOLDER / name)
    for marker in markers:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    try:
        yield markers
    finally:
        for marker in markers:
            marker.unlink(missing_ok=True)


def _remove_previous_run(run: RunSpec) -> None:
    """Remove results, and with --overwrite_output_dir checkpoints: only now, after every check of the flags.

    The previous model stays until the new one replaces it.
    """
    (run.output / RESULTS).unlink(missing_ok=True)
    if run.overwrite:
        for checkpoint in _checkpoints(run):
            delete_checkpoint(checkpoint)
        shutil.rmtree(run.output / row_records.FOLDER, ignore_errors=True)


# --- report -----------------------------------------------------------------------------------------------------------


def _summarize(spec: TrainingSpec, metrics: dict[str, float], console: Console) -> None:
    from raybge.evaluation.metric_changes import changes_in, print_changes
    from raybge.evaluation.weight_versions import versions_in, versions_table

    console.info(
        f"trained {plural(int(metrics['steps']), 'step')} in {format_duration(metrics['train_runtime'])} "
        f"({metrics['train_samples_per_second']:,.1f} {plural_noun(spec.task.row_noun)}/s), mean loss "
        f"{metrics['train_loss']:.4f}"
    )
    if changes := changes_in(metrics):
        queries = f" of {plural(changes[0].queries, 'query')}" if changes[0].queries else ""
        console.info(f"\nretrieval{queries} before and after training")
        print_changes(changes, console)
        console.info("")
    if versions := versions_table(versions_in(metrics)):
        console.table(versions[0], versions[1:])
        console.info("")
    folder = spec.run.output_dir
    model = os.path.join(folder, spec.task.model_folder).rstrip("/")
    console.info(f"model: {model}\nreport: {folder}/{REPORT}")
    obstacle = upload_obstacle(model)
    console.info(f"not to be published: {obstacle}" if obstacle else f"to publish it:\n  {upload_command(model)}")
