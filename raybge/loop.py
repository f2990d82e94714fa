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

from raybge.checkpoints import HIDDEN, RESULTS, publish
from raybge.data.collate import GroupTokenizer
from raybge.data.stream import StepStream
from raybge.data.tokens import TextTokenizer
from raybge.errors import UserError
from raybge.model.contrastive import ContrastiveModel
from raybge.model.embedding import max_positions
from raybge.model.encoder import Encoder
from raybge.reserved import note
from raybge.stream_trainer import Reporter, StreamTrainer
from raybge.training_report import write_report
from raybge.worker_config import WorkerConfig

if TYPE_CHECKING:
    from raybge.report.train import Shown


def train_worker(settings: dict[str, WorkerConfig]) -> None:
    """Train this worker's share; worker 0 writes the model. Runs inside Ray Train, whose process group it uses."""
    import ray.train

    config = settings["worker"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config.board.join()
    _check_shared(config, rank)
    if rank == 0:
        note(config.output_dir, ray.util.get_current_placement_group())
    torch.set_num_threads(config.cpus)  # Ray sets OMP_NUM_THREADS to what it thinks best
    if config.logging_dir:
        os.environ["TENSORBOARD_LOGGING_DIR"] = config.logging_dir
    args = _arguments(config)
    transformers.set_seed(args.seed)
    trainer = _trainer(config, args, rank, world)
    transformers.set_seed(args.seed + rank)  # dropout differs between workers; the order and the draws do not
    result = trainer.train(resume_from_checkpoint=config.resume_from)
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


def _trainer(config: WorkerConfig, args: transformers.TrainingArguments, rank: int, world: int) -> StreamTrainer:
    encoder = Encoder(**config.encoder, use_fp16=False, devices=str(args.device))
    if config.fix_position_embedding:
        encoder.model.freeze_positions()
    if args.torch_compile:
        # The network alone: around it are ragged lists, which a compiler would only break its graph at.
        backend, mode = args.torch_compile_backend, args.torch_compile_mode
        encoder.model.backbone.compile(backend=backend, mode=mode, dynamic=True)
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    else:
        encoder.model.prepare_for_training()
    if config.objective.mrl_dims and max(config.objective.mrl_dims) > encoder.dim:
        raise UserError(f"--mrl_dims must be at most {encoder.dim}, the model's width")
    validation = None
    if config.validation:
        from raybge.validation import Validation

        validation = Validation(config.validation, rank, world, config.kept)
    guide = Encoder(**config.guide, use_fp16=False, devices=str(args.device)) if config.guide else None
    model = ContrastiveModel(
        encoder.model,
        config.objective,
        config.pad_to_multiple_of,
        config.sub_batch_size,
        guide.model if guide else None,
    )
    _introduce(model, encoder.model.backbone)
    tokenizer = GroupTokenizer(_texts(encoder, config), **config.draws, guide=_texts(guide, config) if guide else None)
    reporter = Reporter(config.board if rank == 0 else None)
    trainer = StreamTrainer(
        StepStream(config.survey, config.order, tokenizer, rank, world, config.reading_cpus, kept=config.kept),
        encoder,
        config.identity,
        validation,
        _report_to_ray,
        config.before,
        model=model,
        args=args,
        callbacks=[reporter],
    )
    reporter.trainer = trainer
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _texts(encoder: Encoder, config: WorkerConfig) -> TextTokenizer:
    return TextTokenizer(encoder.tokenizer, encoder.instructions, **_clipped(config.lengths, encoder))


def _introduce(model: Any, backbone: Any) -> None:
    """What the Trainer and its helpers ask of the model they train, and find only on transformers' own."""
    model.config = backbone.config
    model.get_input_embeddings = backbone.get_input_embeddings
    model.activation_checkpointing_enable = backbone.activation_checkpointing_enable


def _check_shared(config: WorkerConfig, rank: int) -> None:
    for marker in config.markers:
        if not os.path.exists(marker):
            raise UserError(
                f"worker {rank} does not see {os.path.dirname(marker)}: several machines need an --output_dir and a "
                "--storage_path on folders that all of them share"
            )


def _clipped(lengths: dict[str, int], encoder: Encoder) -> dict[str, int]:
    """The lengths, where they are more than the model can hold, cut to that."""
    room = max_positions(encoder.model.backbone)
    return {name: min(value, room) if room else value for name, value in lengths.items()}


def _report_to_ray(folder: Path) -> None:
    """Tell Ray Train of a checkpoint. It lies where it should: what Ray keeps is a pointer of a few bytes."""
    import ray.train

    context = ray.train.get_context()
    pointer = None
    if context.get_world_rank() == 0:
        place = Path(context.get_storage().experiment_fs_path) / folder.name
        place.mkdir(parents=True, exist_ok=True)
        (place / "pointer.json").write_text(json.dumps({"path": str(folder)}))
        pointer = ray.train.Checkpoint.from_directory(place)
    mode = ray.train.CheckpointUploadMode.NO_UPLOAD
    ray.train.report({"checkpoint": str(folder)}, checkpoint=pointer, checkpoint_upload_mode=mode)


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
    trainer.encoder.save(aside, weights, config.merge_adapters)
    history = trainer.state.log_history
    before = next((_measured(e) for e in history if _measured(e) and not e["step"]), None)
    plain = {name.removeprefix("eval_"): value for name, value in (before or {}).items()}
    after = {name.removeprefix("eval_"): value for name, value in _measured(metrics).items()}
    Card(**config.card, history=history, before=plain or None, after=after or None).write(aside)
    write_report(aside, config, trainer, metrics, shown)
    trainer.state.save_to_json(str(aside / "trainer_state.json"))
    (aside / RESULTS).write_text(json.dumps(dict(metrics), indent=2) + "\n")
    publish(aside, Path(config.output_dir))
