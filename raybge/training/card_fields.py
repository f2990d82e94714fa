"""Model card of a run, from its configuration and, at its end, from the trainer of worker 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raybge.data.row_sample import RowSample, sample_rows
from raybge.data.tokenize import token_ids
from raybge.evaluation.metric_changes import changes_in
from raybge.evaluation.weight_versions import versions_in, versions_table
from raybge.model.embedding import max_positions
from raybge.model.folder import read_settings, vector_width
from raybge.model.training_card import TrainingCard
from raybge.report.text import format_duration, format_value
from raybge.util.errors import log_errors
from raybge.util.plural import plural, plural_noun

if TYPE_CHECKING:
    from raybge.training.trainer import StreamTrainer
    from raybge.training.worker_config import WorkerConfig

# TrainingArguments that the weights depend on.
_ARGUMENTS = (
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs gradient_accumulation_steps "
    "optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm neftune_noise_alpha seed data_seed "
    "bf16 fp16 tf32 gradient_checkpointing load_best_model_at_end"
).split()
_MOST_TOKENS = 1 << 20  # no truncation


def training_card(
    config: WorkerConfig, trainer: StreamTrainer, metrics: Mapping[str, Any], folder: Path
) -> TrainingCard:
    """Collect the model card at the end of a run.

    Args:
        config: The worker's configuration.
        trainer: The trainer.
        metrics: The Trainer's metrics, and the changes of the retrieval metrics.
        folder: The saved model.

    Returns:
        The card.
    """
    arguments = {name: getattr(trainer.args, name, None) for name in _ARGUMENTS}
    fields = dict(config.card)
    hyperparameters = {**fields.pop("hyperparameters", {}), **arguments, "steps": trainer.state.max_steps}
    return TrainingCard(
        **fields,
        history=trainer.state.log_history,
        metrics=changes_in(metrics),
        weight_versions=versions_table(versions_in(metrics)),
        settings=read_settings(str(folder)),
        width=vector_width(str(folder)) or getattr(trainer.components.encoder, "dim", None),
        lengths=_trained_lengths(config, trainer),
        sample=_sample(config, trainer),
        hyperparameters=hyperparameters,
        training=_training_facts(config, trainer, metrics),
    )


def _trained_lengths(config: WorkerConfig, trainer: StreamTrainer) -> dict[str, int]:
    room = max_positions(trainer.components.backbone)
    return {kind: min(length, room or length) for kind, length in config.task.spec.trained_lengths.items()}


def _sample(config: WorkerConfig, trainer: StreamTrainer) -> RowSample | None:
    """Sample the rows; rows that cannot be read any more are logged, and the model is saved without a sample."""
    tokenizer = trainer.components.encoder.tokenizer

    def token_counts(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in token_ids(tokenizer, list(texts), _MOST_TOKENS)]

    sample = None
    with log_errors():
        sample = sample_rows(config.survey, config.task.spec.row_parser, token_counts)
    return sample


def _training_facts(config: WorkerConfig, trainer: StreamTrainer, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of steps, hardware and time."""
    order, rows, world = config.order, plural_noun(config.task.spec.row_noun), trainer.stream.world
    facts = [
        ("steps", f"{trainer.state.global_step:,} of {order.global_batch:,} {rows}"),
        ("epochs", format_value(float(metrics.get("epoch", 0)))),
        ("hardware", f"{world:,} × {_device_name(trainer.args.device, config.cpus)}"),
    ]
    if trainer.args.device.type == "cuda":
        facts.append(("peak GPU memory", f"{torch.cuda.max_memory_allocated(trainer.args.device) / 2**30:,.1f} GiB"))
    if "train_runtime" in metrics:
        note = " since the run was continued" if config.resume_from else ""
        facts.append(("time", format_duration(float(metrics["train_runtime"])) + note))
    if "train_samples_per_second" in metrics:
        facts.append((f"{rows} per second", format_value(float(metrics["train_samples_per_second"]))))
    return facts


def _device_name(device: torch.device, cpus: int) -> str:
    """Return the name of a GPU, or the number of cores and the name of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    return f"{plural(cpus, 'core')} of {name}"
