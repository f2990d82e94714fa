"""A training run from its flags to its result, whatever is trained: check, read, plan, train, report.

`raybge.train` and `raybge.pretrain` are this with another `Learning`: what is trained, and on what rows.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from raybge.cli.console import Console
from raybge.cli.options import LoopOptions, PretrainOptions, TrainOptions
from raybge.cluster.resources import Cluster, Plan, connect, grown, plan_workers, reading_cpus
from raybge.cluster.shared_paths import check_shared
from raybge.training import row_records as row_log
from raybge.training.checkpoint.manifest import (
    RESULTS,
    check_writable,
    discard,
    finished,
    numbered,
    resumes,
    starting_point,
)
from raybge.training.elastic import Elastic, within
from raybge.training.trainer_arguments import check as check_training
from raybge.training.trainer_arguments import process_group
from raybge.training.worker_config import data_sets_of, device_batch_of, seed_of, worker_config
from raybge.util.errors import UserError
from raybge.util.filesystem import HIDDEN, filesystem, is_local
from raybge.util.redaction import public
from raybge.util.retry import QUICK, WAITS, retried

if TYPE_CHECKING:
    from raybge.data.jsonl import SourceFile
    from raybge.data.order import Order
    from raybge.data.survey import Survey
    from raybge.training.checkpoint.manifest import Checkpoint
    from raybge.training.worker_config import Learning, TrialContext


def train(arguments: TrainOptions, console: Console, context: TrialContext | None = None) -> dict[str, float]:
    """Fine-tune, and return the Trainer's metrics."""
    from raybge.training.tasks.finetuning import FineTuning

    return run(arguments, FineTuning, console, context)


def pretrain(arguments: PretrainOptions, console: Console) -> dict[str, float]:
    """Pre-train, and return the Trainer's metrics."""
    from raybge.training.tasks.pretraining import PreTraining

    return run(arguments, PreTraining, console)


def run(
    arguments: LoopOptions, learning: type[Learning], console: Console, context: TrialContext | None = None
) -> dict[str, float]:
    """Train, and return the Trainer's metrics. Raises UserError, before any model loads, for what cannot be used."""
    from raybge.data.order import lane_count
    from raybge.data.source_files import list_files
    from raybge.data.survey import IN_PROCESS_BYTES
    from raybge.training.worker_config import TrialContext

    context = context or TrialContext()

    output = _check(arguments, learning)
    if resumes(arguments.training, arguments.resume) and (metrics := finished(output)):
        console.info(f"nothing to continue: the run of {output} is finished")
        return metrics
    start = starting_point(arguments.training, arguments.resume, _storage(arguments))
    if start and arguments.global_batch_size is None:
        # The workers may be others than at the start; what the objective depends on is not.
        arguments = replace(arguments, global_batch_size=start.identity.global_batch)
    files = list_files(arguments.train_data, "--train_data")
    # Small data is read before Ray starts, so that what is wrong with it is said at once.
    small = _survey(arguments, learning, files, output) if sum(f.size for f in files) <= IN_PROCESS_BYTES else None
    written = {"--output_dir": str(output), "--storage_path": _storage(arguments)}
    wanted = arguments.num_workers, _use_gpu(arguments), arguments.cpus_per_worker
    with connect(arguments.address, arguments.verbose) as cluster:
        cluster = grown(cluster, *wanted, console.info, elastic=True)
        check_shared(cluster, written, learning.inputs(arguments, files))
        plan = plan_workers(cluster, *wanted, elastic=True)
        global_batch = arguments.global_batch_size or device_batch_of(arguments) * plan.workers
        plan = within(plan, lane_count(global_batch), console.info)
        survey = small or _survey(arguments, learning, files, output)
        if survey.bad_count:
            from raybge.data.survey import named

            console.info(f"skipped {survey.bad_count:,} rows that cannot be used:\n{named(survey)}")
        batches = _order(arguments, survey, plan)
        _describe(arguments, learning, console, cluster, plan, survey, batches)
        _say_start(arguments, console, start)
        reading = reading_cpus(cluster, plan, context.runs)
        metrics = _run(arguments, learning, console, plan, reading, survey, batches, output, start, context)
    if arguments.dry_run:
        return {}
    console.info(
        f"trained {metrics['steps']:,.0f} steps in {metrics['train_runtime']:,.0f} s "
        f"({metrics['train_samples_per_second']:,.1f} {learning.rows}/s), mean loss {metrics['train_loss']:.4f}"
    )
    output_dir = arguments.training["output_dir"]
    console.info(f"model: {os.path.join(output_dir, learning.folder).rstrip('/')}, report: {output_dir}/report.html")
    return metrics


def _say_start(arguments: LoopOptions, console: Console, start: Checkpoint | None) -> None:
    if start:
        console.info(f"continues from {public(start.path)}: {start.step:,} updates are done")
    elif resumes(arguments.training, arguments.resume):
        console.info("nothing to continue: there is no whole checkpoint, the run starts from the beginning")


# --- check ------------------------------------------------------------------------------------------------------------


def _check(arguments: LoopOptions, learning: type[Learning]) -> Path:
    """Everything that can be said about the flags alone; returns the output folder."""
    learning.check(arguments)
    if "://" in arguments.training["output_dir"]:
        raise UserError(
            f"--output_dir {arguments.training['output_dir']}: a model is written into a folder, which all "
            "nodes share; checkpoints may go to a URI, --storage_path"
        )
    if seed_of(arguments) < 0 or arguments.training.get("seed", 0) < 0:
        raise UserError("--seed and --data_seed must be at least 0")
    check_training(arguments)
    output = Path(os.path.abspath(arguments.training["output_dir"]))
    _check_output(arguments, output)
    return output


def _check_output(arguments: LoopOptions, output: Path) -> None:
    """Whether the output folder may be written."""
    resume = resumes(arguments.training, arguments.resume)
    if arguments.overwrite_output_dir and resume:
        raise UserError("--overwrite_output_dir removes the run that is to be continued: leave it out, or the other")
    model = arguments.model_name_or_path
    if model and arguments.overwrite_output_dir and output in Path(os.path.abspath(model)).parents:
        raise UserError(f"--model_name_or_path {model} lies in the --output_dir that is to be overwritten")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file")
    storage = _storage(arguments)
    if not resume and not arguments.overwrite_output_dir and storage != str(output) and _checkpoints(storage):
        raise UserError(
            f"--storage_path {storage} holds checkpoints of another run; choose another, or add "
            "--overwrite_output_dir, or --resume to continue that run"
        )
    if not output.exists() or arguments.overwrite_output_dir or all(p.name == HIDDEN for p in output.iterdir()):
        return
    if not resume:
        raise UserError(
            f"--output_dir {output} is not empty; choose another, or add --overwrite_output_dir, or --resume to "
            "continue its run"
        )
    if not (output / HIDDEN).is_dir():
        raise UserError(f"--output_dir {output} is not empty, and there is no run in it to continue")


def _storage(arguments: LoopOptions) -> str:
    """Where checkpoints lie: a folder or a URI."""
    place = arguments.storage_path or arguments.training["output_dir"]
    return os.path.abspath(filesystem(place)[1]) if is_local(place, "--storage_path") else place


def _checkpoints(storage: str) -> list[str]:
    return retried(lambda: numbered(storage), f"--storage_path: {storage} cannot be read", WAITS[:QUICK])


def _kept(arguments: LoopOptions, output: Path) -> Path:
    """The folder for what else a run keeps, which all nodes share."""
    storage = _storage(arguments)
    return Path(storage) if is_local(storage, "--storage_path") else output


def _use_gpu(arguments: LoopOptions) -> bool | None:
    return False if arguments.training.get("use_cpu") else arguments.use_gpu


# --- read -------------------------------------------------------------------------------------------------------------


def _survey(arguments: LoopOptions, learning: type[Learning], files: list[SourceFile], output: Path) -> Survey:
    """Count and check every row. Files that cannot be read from the middle are written out plain once."""
    from raybge.data.order import block_bytes
    from raybge.data.ray_datasets import transcode
    from raybge.data.survey import survey

    hidden = str(_kept(arguments, output) / HIDDEN)
    # Parquet too: a row group, often a million rows, would be read for each of its rows' windows.
    files = transcode(files, f"{hidden}/data", ("gzip", "zstd", "array", "parquet"))
    size = block_bytes(sum(f.size for f in files))
    return survey(files, size, learning.parse(arguments), arguments.on_bad_rows, cache_dir=hidden)


# --- plan -------------------------------------------------------------------------------------------------------------


def _order(arguments: LoopOptions, survey: Survey, plan: Plan) -> Order:
    from raybge.data.order import Order, window_rows

    global_batch = arguments.global_batch_size or device_batch_of(arguments) * plan.workers
    drop_last = arguments.training.get("dataloader_drop_last", False)
    mixture = data_sets_of(arguments, survey).mixture
    window = window_rows(sum(f.size for f in survey.files), survey.total_rows)
    order = Order(survey.rows, global_batch, seed_of(arguments), drop_last, mixture, window)
    order.owned(0, plan.workers)
    if not order.steps:
        raise UserError(
            f"{order.total:,} rows are less than one global batch of {global_batch:,}, and --dataloader_drop_last "
            "leaves out what is not full"
        )
    return order


def _describe(
    arguments: LoopOptions,
    learning: type[Learning],
    console: Console,
    cluster: Cluster,
    plan: Plan,
    survey: Survey,
    order: Order,
) -> None:
    console.info(f"cluster: {cluster.describe()}; {plan.describe('training worker')}")
    model, batches = learning.describe(arguments)
    console.info(model)
    files = len(survey.files)
    console.info(
        f"data: {order.total:,} {learning.rows} an epoch from {files} file{'s' * (files != 1)}; "
        f"{order.steps:,} steps an epoch of {order.global_batch:,} {learning.rows}{batches}"
    )
    for line in data_sets_of(arguments, survey).describe(survey, order):
        console.info(line)
    if not plan.gpus:
        for name in ("fp16", "bf16"):
            if arguments.training.get(name):
                console.info(f"--{name} is off: there is no GPU, and half precision gains nothing on a CPU")


# --- run --------------------------------------------------------------------------------------------------------------


def _run(
    arguments: LoopOptions,
    learning: type[Learning],
    console: Console,
    plan: Plan,
    reading: float,
    survey: Survey,
    order: Order,
    output: Path,
    start: Checkpoint | None,
    context: TrialContext,
) -> dict[str, float]:
    from raybge.training.controller import Launch
    from raybge.training.health.run_state import Board

    storage, kept = _storage(arguments), _kept(arguments, output)
    check_writable(storage)
    run = f"run-{uuid.uuid4().hex}"
    markers = (output / HIDDEN / run, kept / HIDDEN / run)
    for marker in markers:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    board = Board()
    try:
        made = learning.of(arguments, survey)
        config = worker_config(arguments, made, plan, reading, survey, order, output, kept, markers, board, context)
        config = replace(config, storage=storage)
        if start:
            start.check(config.identity)
            config = replace(config, resume_from=start.path)
        group = process_group(arguments, plan)
        for line in config.validation.lines() if config.validation else []:
            console.info(line)
        if arguments.dry_run:
            return {}
        # Only now, when nothing more can be wrong with the flags. The old model stays until the new one is there.
        (output / RESULTS).unlink(missing_ok=True)
        if arguments.overwrite_output_dir:
            for old in _checkpoints(storage):
                discard(old)
            shutil.rmtree(output / row_log.FOLDER, ignore_errors=True)
        notes = kept / HIDDEN / f"ray-{run}"
        elastic = Elastic(*plan.range, storage, context.runs) if plan.range else None
        launch = Launch(config, plan, group, storage, notes, arguments.max_failures, context.on_measured, elastic)
        return launch.watch(console)
    finally:
        for marker in markers:
            marker.unlink(missing_ok=True)
        shutil.rmtree(kept / HIDDEN / f"ray-{run}", ignore_errors=True)
