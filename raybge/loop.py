"""The training loop of one worker: transformers' Trainer, fed by the worker's own stream.

Ray Train starts `train_worker` in every worker. It knows nothing of the command line; `train.py` prepares its config.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from raybge.board import Board
from raybge.data.collate import GroupTokenizer
from raybge.data.order import Order
from raybge.data.stream import StepStream
from raybge.data.survey import Survey
from raybge.errors import UserError
from raybge.model.contrastive import ContrastiveModel
from raybge.model.embedding import max_positions
from raybge.model.encoder import Encoder
from raybge.model.folder import remove_weights
from raybge.model.negatives import Objective

REPORT_SECONDS = 0.5


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker needs to know, prepared by the driver.

    `encoder` are Encoder's arguments, `tokens` those of GroupTokenizer that are not the encoder's, `training` those of
    TrainingArguments. Paths are absolute: a worker's current folder is Ray's.
    """

    encoder: dict[str, Any]
    tokens: dict[str, int]
    objective: Objective
    training: dict[str, Any]
    survey: Survey
    order: Order
    output_dir: str
    markers: tuple[str, ...]
    cpus: int
    reading_cpus: float
    fix_position_embedding: bool
    merge_adapters: bool
    pad_to_multiple_of: int | None
    logging_dir: str | None
    board: Board


class StreamTrainer(transformers.Trainer):
    """transformers' Trainer on a stream that is already this worker's own share."""

    def __init__(self, stream: StepStream, encoder: Encoder, **kwargs: Any):
        super().__init__(**kwargs)
        self.stream = stream
        self.encoder = encoder
        self.recent: list[tuple[torch.Tensor, int]] = []

    def get_train_dataloader(self) -> StepStream:
        return self.stream

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        loss = model(**inputs)
        batch = inputs["batch"]
        if self.stream.rank:
            return loss  # worker 0 alone reports
        # The loss is scaled for the mean over workers (see Objective): this undoes it.
        total = loss.detach() * self.stream.order.size(self.stream.epoch, batch.step) / self.stream.world
        self.recent.append((total, len(batch.passages_B)))
        return loss

    def recent_loss(self) -> float:
        """Mean loss of this worker's own queries since the last call, nan when there were none."""
        totals, rows = zip(*self.recent, strict=True)
        self.recent = []
        return torch.stack(totals).sum().item() / sum(rows) if sum(rows) else float("nan")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint is a model folder like any other. training_args.bin is left out: it holds the hub's token."""
        self.encoder.save(output_dir or str(self.args.output_dir))


class Reporter(transformers.TrainerCallback):
    """Tells the driver's progress bar where the run is, at most twice a second."""

    def __init__(self, board: Board):
        self.board = board
        self.trainer: StreamTrainer | None = None
        self.told = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.board.begin(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        if self.trainer and (now - self.told >= REPORT_SECONDS or state.global_step == state.max_steps):
            self.told = now
            self.board.tell(state.global_step, self.trainer.recent_loss())


def train_worker(settings: dict[str, WorkerConfig]) -> None:
    """Train this worker's share; worker 0 writes the model. Runs inside Ray Train, whose process group it uses."""
    import ray.train

    config = settings["worker"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    _check_shared(config, rank)
    torch.set_num_threads(config.cpus)  # Ray sets OMP_NUM_THREADS to what it thinks best
    if config.logging_dir:
        os.environ["TENSORBOARD_LOGGING_DIR"] = config.logging_dir
    args = transformers.TrainingArguments(**config.training)
    transformers.set_seed(args.seed)
    encoder = Encoder(**config.encoder, use_fp16=False, devices=str(args.device))
    if config.fix_position_embedding:
        encoder.model.freeze_positions()
    tokenizer = GroupTokenizer(encoder.tokenizer, encoder.instructions, **_clipped(config.tokens, encoder))
    reporter = Reporter(config.board)
    trainer = StreamTrainer(
        StepStream(config.survey, config.order, tokenizer, rank, world, config.reading_cpus),
        encoder,
        model=ContrastiveModel(encoder.model, config.objective, config.pad_to_multiple_of),
        args=args,
        callbacks=[reporter] if rank == 0 else [],
    )
    reporter.trainer = trainer
    trainer.remove_callback(transformers.PrinterCallback)
    transformers.set_seed(args.seed + rank)  # dropout differs between workers; the order and the draws do not
    result = trainer.train()
    if rank == 0:
        _check_shared(config, rank)  # a driver that is gone has taken its markers along: its folder is not ours
        metrics = {**result.metrics, "steps": trainer.state.global_step}
        _write_result(config, encoder, trainer, metrics)
        config.board.finish(metrics)


def _check_shared(config: WorkerConfig, rank: int) -> None:
    for marker in config.markers:
        if not os.path.exists(marker):
            raise UserError(
                f"worker {rank} does not see {os.path.dirname(marker)}: several machines need an --output_dir and a "
                "--storage_path on folders that all of them share"
            )


def _clipped(tokens: dict[str, int], encoder: Encoder) -> dict[str, int]:
    """The arguments of GroupTokenizer with lengths that the model can hold."""
    room = max_positions(encoder.model.backbone)
    return {name: min(value, room) if room and name.endswith("_len") else value for name, value in tokens.items()}


def _write_result(config: WorkerConfig, encoder: Encoder, trainer: StreamTrainer, metrics: Mapping[str, float]) -> None:
    """Write the model aside, then move it in: a reader of the folder never sees half a model."""
    output = Path(config.output_dir)
    aside = output / ".raybge" / "model"
    shutil.rmtree(aside, ignore_errors=True)
    encoder.save(aside, merge_adapters=config.merge_adapters)
    (aside / "train_results.json").write_text(json.dumps(dict(metrics), indent=2) + "\n")
    trainer.state.save_to_json(str(aside / "trainer_state.json"))
    remove_weights(output)  # adapters of an earlier run beside a whole model would be taken for its own
    for path in sorted(aside.iterdir()):
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    aside.rmdir()
