"""StreamTrainers on 50 small groups, in the test's own process and without Ray."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers

from raybge.data.collate import GroupTokenizer, unpack
from raybge.data.groups import parse_group
from raybge.data.order import Order
from raybge.data.prompts import Instructions
from raybge.data.source_files import list_files
from raybge.data.step_batch import StepBatch
from raybge.data.stream import StepReader, StepStream
from raybge.data.survey import Survey, survey
from raybge.data.tokenize import TextTokenizer
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.losses.objective import Objective
from raybge.model.encoder import Encoder
from raybge.training.averaging_spec import AveragingPlan
from raybge.training.callbacks.progress import ProgressCallback
from raybge.training.checkpoint.manifest import RunIdentity
from raybge.training.tasks.task import TaskComponents
from raybge.training.trainer import StreamTrainer, TrainerContext

WORDS = "what is a lane row block of the text that we read and sort by length in chunks on one node".split()
STEPS = 9  # of an epoch: 50 groups in batches of 6


def read_in_process(stream: StepStream) -> Iterator[pa.Table]:
    """Read the steps of a stream in this process; with `read_with_ray`, each window is a task."""
    reader = StepReader.of(stream.survey, stream.order, stream.tokenizer)
    for window in stream.order.windows(stream.epoch, stream.rank, stream.world, stream.start_step):
        yield from reader.steps(stream.epoch, window, stream.start_step)


class LocalStream(StepStream):
    """Stream with the real order and rows, read in this process. `steps_read` lists the (epoch, step) read so far."""

    def __iter__(self) -> Iterator[dict[str, StepBatch]]:
        self.steps_read = getattr(self, "steps_read", [])
        for table in read_in_process(self):
            batch = unpack(table)
            self.steps_read.append((self.epoch, batch.step))
            yield {"batch": batch}


class RunLost(Exception):
    """The process of a run is lost."""


class FailAt(transformers.TrainerCallback):
    """Loses the run at the beginning of the update after `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise RunLost


class ScriptedValidation:
    """Validation that returns given values of nDCG@10, one after the other."""

    last_result = None

    def __init__(self, values: list[float]) -> None:
        self.values = list(values)

    def measure(self, encoder: Encoder, step: int = 0) -> dict[str, float]:
        value = self.values.pop(0)
        return {"nDCG@10": value, "MRR@10": value / 2}


def build_survey(folder: Path) -> Survey:
    """Write 50 groups with 0 to 3 negatives into a folder and survey them."""

    def line(i: int) -> str:
        random = np.random.default_rng(i)
        query, pos, *neg = (" ".join(random.choice(WORDS, n)) for n in (3, 8, *[8] * (i % 4)))
        return json.dumps({"query": query, "pos": [pos], "neg": neg}) + "\n"

    path = folder / "groups.jsonl"
    path.write_text("".join(map(line, range(50))))
    return survey(list_files(str(path), "--train_data"), 256, parse_group)


def build_trainer(
    data: Survey,
    model: str,
    folder: Path,
    callbacks: Any = (),
    validation: Any = None,
    on_checkpoint: Any = None,
    initial_metrics: Any = None,
    storage: str | None = None,
    rank: int = 0,
    world: int = 1,
    averaging: AveragingPlan | None = None,
    lora: Any = None,
    **flags: Any,
) -> StreamTrainer:
    """Build a worker's trainer; global batches of 6 groups of 3 passages, `flags` are those of TrainingArguments."""
    flags = {"logging_steps": 1, "learning_rate": 1e-3, "num_train_epochs": 2, "save_strategy": "no"} | flags
    args = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, ignore_data_skip=True, disable_tqdm=True, **flags
    )
    transformers.set_seed(args.seed)
    encoder = Encoder(model, devices="cpu", lora=lora)
    order = Order(data.rows, 6, seed=1)
    tokenizer = GroupTokenizer(TextTokenizer(encoder.tokenizer, Instructions(), 8, 12), 3, seed=1)
    progress = ProgressCallback(None)
    contrastive = ContrastiveModel(encoder.model, Objective(0.1), None)
    trainer = StreamTrainer(
        LocalStream(data, order, tokenizer, rank, world, 1.0),
        TaskComponents(contrastive, encoder.model.backbone, tokenizer, encoder),
        TrainerContext(
            identity=RunIdentity.of(data, order, args.gradient_accumulation_steps),
            validation=validation,
            on_checkpoint=on_checkpoint,
            initial_metrics=initial_metrics,
            storage=storage,
            averaging=averaging or AveragingPlan(),
        ),
        args=args,
        callbacks=[progress, *callbacks],
    )
    progress.trainer = trainer
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def weights(trainer: StreamTrainer) -> dict[str, torch.Tensor]:
    """Return a copy of the trained weights by name."""
    return {name: p.detach().clone() for name, p in trainer.encoder.model.named_parameters()}


def logged(trainer: StreamTrainer, *names: str) -> list[tuple]:
    """Return (step, values of these names...) of each log entry that has all of them."""
    history = trainer.state.log_history
    return [(e["step"], *(e[n] for n in names)) for e in history if all(n in e for n in names)]
