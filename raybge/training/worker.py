"""The training loop of one worker: transformers' Trainer, fed by the worker's own stream.

Ray Train starts `train_worker` in every worker. It knows nothing of the command line; `train.py` prepares its config.
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

from raybge.cluster.placement_groups import note
from raybge.data.stream import StepStream
from raybge.training.callbacks.graceful_stop import Stopped, Stopping
from raybge.training.callbacks.nonfinite_guard import BadSteps
from raybge.training.callbacks.progress import Reporter
from raybge.training.checkpoint.manifest import RESULTS, name_of, publish
from raybge.training.health.heartbeat import Heart
from raybge.training.report import write_report
from raybge.training.trainer import StreamTrainer
from raybge.training.worker_config import WorkerConfig
from raybge.util.errors import UserError
from raybge.util.filesystem import HIDDEN
from raybge.util.redaction import public

if TYPE_CHECKING:
    from raybge.evaluation.query_examples import Shown


def train_worker(settings: dict[str, WorkerConfig]) -> None:
    """Train this worker's share; worker 0 writes the model. Runs inside Ray Train, whose process group it uses."""
    import ray.train

    config = settings["worker"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config.board.join()
    with Heart(config.board, rank, config.stall_timeout) as heart:
        _train(config, rank, world, context.get_experiment_name(), heart)


def _train(config: WorkerConfig, rank: int, world: int, attempt: str, heart: Heart) -> None:
    import ray

    _check_shared(config, rank)
    if rank == 0:
        note(config.output_dir, ray.util.get_current_placement_group())
    torch.set_num_threads(config.cpus)  # Ray sets OMP_NUM_THREADS to what it thinks best
    if config.logging_dir:
        os.environ["TENSORBOARD_LOGGING_DIR"] = config.logging_dir
    args = _arguments(config)
    transformers.set_seed(args.seed)
    trainer = _trainer(config, args, rank, world, attempt)
    transformers.set_seed(args.seed + rank)  # dropout differs between workers; the order and the draws do not
    trainer.add_callback(Stopping(lambda: heart.told))
    try:
        start = trainer.scratch.fetched(config.resume_from) if config.resume_from else None
        result = trainer.train(resume_from_checkpoint=start)
    except Stopped:
        trainer.settle()
        if rank == 0:
            config.board.stopped(trainer.state.global_step)
        return
    finally:
        trainer.writer.close()
    after = _last_measured(trainer)
    shown = trainer.shown_queries()
    weights = trainer.whole_weights()
    if rank == 0:
        _check_shared(config, rank)  # a driver that is gone has taken its markers along: its folder is not ours
        metrics = {**result.metrics, **after, "steps": trainer.state.global_step}
        _write_result(config, trainer, weights, metrics, shown)
        config.board.finish(metrics)


def _arguments(config: WorkerConfig) -> transformers.TrainingArguments:
    training = dict(config.training)
    if config.validation and not config.resume_from:
        training["eval_on_start"] = True  # the model card says what training gained
    try:
        return transformers.TrainingArguments(**training)
    except (ValueError, ImportError) as error:  # flags that do not go together, known to transformers alone
        raise UserError(f"transformers.TrainingArguments: {error}") from error


def _trainer(
    config: WorkerConfig, args: transformers.TrainingArguments, rank: int, world: int, attempt: str | None = None
) -> StreamTrainer:
    learner = config.learning.learner(args)
    validation = None
    if config.validation:
        from raybge.evaluation.in_training import Validation

        validation = Validation(config.validation, rank, world, config.kept)
    reporter = Reporter(config.board if rank == 0 else None)
    bad_steps = None
    if config.max_bad_steps:
        files = [file.name for file in config.survey.files]
        bad_steps = BadSteps(config.max_bad_steps, files, (lambda line: None) if rank else config.board.say)
    trainer = StreamTrainer(
        StepStream(config.survey, config.order, learner.tokenizer, rank, world, config.reading_cpus, kept=config.kept),
        learner,
        config.identity,
        validation,
        _report_to_ray,
        config.before,
        config.row_log.lines(rank) if config.row_log else None,
        bad_steps,
        config.storage,
        attempt,
        args=args,
        callbacks=[reporter],
    )
    reporter.trainer = trainer
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _check_shared(config: WorkerConfig, rank: int) -> None:
    for marker in config.markers:
        if not os.path.exists(marker):
            raise UserError(
                f"worker {rank} does not see {os.path.dirname(marker)}: several machines need an --output_dir and a "
                "--storage_path on folders that all of them share"
            )


def _report_to_ray(path: str) -> None:
    """Tell Ray Train of a checkpoint. It lies where it should: what Ray keeps is a pointer of a few bytes."""
    import ray.train

    context = ray.train.get_context()
    pointer = None
    if context.get_world_rank() == 0:
        place = Path(context.get_storage().experiment_fs_path) / name_of(path)
        place.mkdir(parents=True, exist_ok=True)
        (place / "pointer.json").write_text(json.dumps({"path": public(path)}))
        pointer = ray.train.Checkpoint.from_directory(place)
    mode = ray.train.CheckpointUploadMode.NO_UPLOAD
    ray.train.report({"checkpoint": public(path)}, checkpoint=pointer, checkpoint_upload_mode=mode)


def _measured(entry: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name.startswith("eval_") and "@" in name}


def _last_measured(trainer: StreamTrainer) -> dict[str, float]:
    """The metrics of the model that is saved, measured now where the last evaluation was of another one."""
    if trainer.validation is None:
        return {}
    last = [e for e in trainer.state.log_history if _measured(e)][-1:]
    same = last and last[0]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end
    return _measured(last[0] if same else trainer.evaluate())


def _write_result(
    config: WorkerConfig,
    trainer: StreamTrainer,
    weights: dict[str, torch.Tensor] | None,
    metrics: Mapping[str, Any],
    shown: Sequence[Shown],
) -> None:
    """Write model, card, report and results aside, then move them in."""
    from raybge.model.card import Card

    aside = Path(config.output_dir) / HIDDEN / "model"
    shutil.rmtree(aside, ignore_errors=True)
    model = aside / config.learning.folder
    config.learning.save(trainer.learner, model, weights)
    history = trainer.state.log_history
    before = next((_measured(e) for e in history if _measured(e) and not e["step"]), None)
    plain = {name.removeprefix("eval_"): value for name, value in (before or {}).items()}
    after = {name.removeprefix("eval_"): value for name, value in _measured(metrics).items()}
    Card(**config.card, history=history, before=plain or None, after=after or None).write(model)
    write_report(aside, config, trainer, metrics, shown)
    trainer.state.save_to_json(str(aside / "trainer_state.json"))
    (aside / RESULTS).write_text(json.dumps(dict(metrics), indent=2) + "\n")
    publish(aside, Path(config.output_dir))
