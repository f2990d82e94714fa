"""Training loop of one worker: transformers' Trainer on the worker's own stream.

The runtime, Ray Train, calls `train_worker` in every worker. The driver prepares its configuration; nothing here reads
options.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from raybge.data.stream import StepStream, read_in_process
from raybge.model.precision import bf16_message, cpu_bf16_message, cpu_has_bf16_units
from raybge.training.callbacks.graceful_stop import GracefulStopCallback, TrainingStopped
from raybge.training.callbacks.nonfinite_guard import NonFiniteGuard
from raybge.training.callbacks.progress import ProgressCallback
from raybge.training.card_fields import training_card
from raybge.training.checkpoint.final_model import RESULTS, publish_model
from raybge.training.final_weights import final_metrics
from raybge.training.health.heartbeat import Heartbeat
from raybge.training.page import write_report
from raybge.training.trainer import StreamTrainer, TrainerContext
from raybge.training.trainer_check import check_packages
from raybge.training.worker_config import WorkerConfig
from raybge.util.activity import phase
from raybge.util.errors import UserError
from raybge.util.filesystem import STATE_FOLDER

if TYPE_CHECKING:
    from raybge.evaluation.query_examples import QueryExample
    from raybge.training.runtime import WorkerContext, WorkerSettings


def train_worker(settings: WorkerSettings) -> None:
    """Train on this worker's share of the data; worker 0 writes the model.

    Args:
        settings: configuration of the worker and its surroundings.
    """
    config, context = settings["worker"], settings["context"]()
    config.run_state.register_worker(context.handle)
    with Heartbeat(config.run_state, context.rank, context.address, config.stall_timeout) as heartbeat:
        _train(config, context, heartbeat)


def _train(config: WorkerConfig, context: WorkerContext, heartbeat: Heartbeat) -> None:
    rank = context.rank
    _check_shared_folders(config, rank)
    if rank == 0:
        context.record_resources(config.output_dir)
    torch.set_num_threads(config.cpus)  # Ray has set OMP_NUM_THREADS to a value of its own
    if config.logging_dir:
        os.environ["TENSORBOARD_LOGGING_DIR"] = config.logging_dir
    args = build_arguments(config)
    transformers.set_seed(args.seed)
    with phase("loading the model"):
        trainer = build_trainer(config, args, context)
    transformers.set_seed(args.seed + rank)  # dropout differs between workers; order and random draws do not
    trainer.add_callback(GracefulStopCallback(lambda: heartbeat.stop_requested))
    try:
        start = trainer.staging.fetch(config.resume_from) if config.resume_from else None
        result = trainer.train(resume_from_checkpoint=start)
        final = final_metrics(trainer)
    except TrainingStopped:
        trainer.wait_for_checkpoint()
        if rank == 0:
            config.run_state.set_stopped(trainer.state.global_step)
        return
    finally:
        trainer.writer.close()
    with phase("writing the model"):
        examples = trainer.query_examples()
        weights = trainer.gather_weights()
        if rank == 0:
            # A driver that has ended has deleted its markers: the output folder may belong to another run now.
            _check_shared_folders(config, rank)
            metrics = {**result.metrics, "steps": trainer.state.global_step, **final}
            _write_result(config, trainer, weights, metrics, examples)
            config.run_state.set_finished(metrics)


def build_arguments(config: WorkerConfig) -> transformers.TrainingArguments:
    """Return the worker's TrainingArguments. Raises a UserError for flags that it refuses, or a missing package."""
    training = dict(config.training)
    if config.validation and not config.resume_from:
        training["eval_on_start"] = True  # the model card compares the metrics before and after training
    if training.get("use_cpu"):
        training["bf16"] = bool(training.get("bf16")) and cpu_has_bf16_units()
    try:
        args = transformers.TrainingArguments(**training)
    except (ValueError, ImportError) as error:
        remedy = "; use --fp16 True, or fp32" if training.get("bf16") and "bf16" in str(error) else ""
        raise UserError(f"transformers.TrainingArguments: {error}{remedy}") from error
    check_packages(args)  # the driver may run on another machine
    return args


def _bf16_message(args: transformers.TrainingArguments) -> str | None:
    """Return the line on what --bf16 does on the worker's device, None where it does what is expected."""
    return cpu_bf16_message("--bf16") if args.device.type == "cpu" else bf16_message(args.device)


def build_trainer(config: WorkerConfig, args: transformers.TrainingArguments, context: WorkerContext) -> StreamTrainer:
    """Build the model and its trainer.

    Args:
        config: configuration of the worker.
        args: TrainingArguments, see `build_arguments`.
        context: surroundings of the worker.

    Returns:
        The trainer.
    """
    rank, world = context.rank, context.world
    components = config.task.build(args)
    message = _bf16_message(args) if config.training.get("bf16") else None
    for line in (*components.messages, *([message] if message else [])):
        config.run_state.add_message(line)
    validation = None
    if config.validation:
        from raybge.evaluation.in_training import RetrievalValidator

        validation = RetrievalValidator(config.validation, rank, world, config.token_cache)
    nonfinite_guard = None
    if config.max_bad_steps:
        files = [file.name for file in config.survey.files]
        log = (lambda line: None) if rank else config.run_state.add_message
        nonfinite_guard = NonFiniteGuard(config.max_bad_steps, files, log)
    tokenizer, reading_cpus = components.tokenizer, config.reading_cpus
    stream = StepStream(config.survey, config.order, tokenizer, rank, world, reading_cpus)
    stream.token_cache = config.token_cache
    stream.read_tables = read_in_process if config.reads_in_process else context.read_steps
    progress = ProgressCallback(config.run_state if rank == 0 else None)
    trainer = StreamTrainer(
        stream,
        components,
        TrainerContext(
            identity=config.identity,
            validation=validation,
            on_checkpoint=context.report_checkpoint,
            initial_metrics=config.initial_metrics,
            row_writer=config.row_log.writer(rank) if config.row_log else None,
            nonfinite_guard=nonfinite_guard,
            storage=config.storage,
            attempt=context.attempt,
            averaging=config.averaging,
        ),
        args=args,
        callbacks=[progress],
    )
    progress.trainer = trainer
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _check_shared_folders(config: WorkerConfig, rank: int) -> None:
    for marker in config.markers:
        if not os.path.exists(marker):
            raise UserError(
                f"worker {rank} cannot see {os.path.dirname(marker)}: on several nodes, --output_dir and "
                "--storage_path must be on folders that all nodes share"
            )


def _write_result(
    config: WorkerConfig,
    trainer: StreamTrainer,
    weights: dict[str, torch.Tensor] | None,
    metrics: Mapping[str, Any],
    examples: Sequence[QueryExample],
) -> None:
    """Write model, card, report and results into a staging folder, then move them into the output folder."""
    staging = Path(config.output_dir) / STATE_FOLDER / "model"
    shutil.rmtree(staging, ignore_errors=True)
    model_folder = staging / config.task.spec.model_folder
    config.task.save(trainer.components, model_folder, weights)
    training_card(config, trainer, metrics, model_folder).write(model_folder)
    write_report(staging, config, trainer, metrics, examples)
    trainer.state.save_to_json(str(staging / "trainer_state.json"))
    (staging / RESULTS).write_text(json.dumps(dict(metrics), indent=2) + "\n")
    publish_model(staging, Path(config.output_dir))
