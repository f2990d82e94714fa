"""StreamTrainers on 50 small groups, in the test's process and without Ray."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from raybge.data.collate import GroupTokenizer, StepBatch, unpack
from raybge.data.groups import parse_group
from raybge.data.order import Order
from raybge.data.prompts import Instructions
from raybge.data.source_files import list_files
from raybge.data.stream import Reading, StepStream
from raybge.data.survey import Survey, survey
from raybge.data.tokenize import TextTokenizer
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.losses.objective import Objective
from raybge.model.encoder import Encoder
from raybge.training.callbacks.progress import Reporter
from raybge.training.checkpoint.manifest import Identity
from raybge.training.tasks.task import Learner
from raybge.training.trainer import StreamTrainer

WORDS = "what is a lane row block of the text that we read and sort by length in chunks on one node".split()
STEPS = 9  # of an epoch: 50 groups in batches of 6


class LocalStream(StepStream):
    """The real order and rows, read in this process. `seen` collects what was read."""

    def __iter__(self) -> Iterator[dict[str, StepBatch]]:
        self.seen = getattr(self, "seen", [])
        reading = Reading.of(self.survey, self.order, self.tokenizer)
        for window in self.order.windows(self.epoch, self.rank, self.world, self.start_step):
            for table in reading.steps(self.epoch, window, self.start_step):
                batch = unpack(table)
                self.seen.append((self.epoch, batch.step))
                yield {"batch": batch}


class Stop(Exception):
    """The run is lost here."""


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Stop


class Scripted:
    """A validation that measures what it is told to, one value after the other."""

    last = None

    def __init__(self, values: list[float]) -> None:
        self.values = list(values)

    def measure(self, encoder: Encoder) -> dict[str, float]:
        value = self.values.pop(0)
        return {"nDCG@10": value, "MRR@10": value / 2}


def surveyed(folder: Path) -> Survey:
    """The groups, written into a folder and counted."""

    def line(i: int) -> str:
        random = np.random.default_rng(i)
        query, pos, *neg = (" ".join(random.choice(WORDS, n)) for n in (3, 8, *[8] * (i % 4)))
        return json.dumps({"query": query, "pos": [pos], "neg": neg}) + "\n"

    path = folder / "groups.jsonl"
    path.write_text("".join(map(line, range(50))))
    return survey(list_files(str(path), "--train_data"), 256, parse_group)


def stream_trainer(
    found: Survey,
    model: str,
    folder: Path,
    callbacks=(),
    validation=None,
    on_checkpoint=None,
    before=None,
    storage=None,
    **flags: Any,
) -> StreamTrainer:
    """Its flags are those of TrainingArguments."""
    flags = {"logging_steps": 1, "learning_rate": 1e-3, "num_train_epochs": 2, "save_strategy": "no"} | flags
    args = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, ignore_data_skip=True, disable_tqdm=True, **flags
    )
    transformers.set_seed(args.seed)
    encoder = Encoder(model, devices="cpu")
    order = Order(found.rows, 6, seed=1)
    tokenizer = GroupTokenizer(TextTokenizer(encoder.tokenizer, Instructions(), 8, 12), 3, seed=1)
    reporter = Reporter(None)
    contrastive = ContrastiveModel(encoder.model, Objective(0.1), None)
    made = StreamTrainer(
        LocalStream(found, order, tokenizer, 0, 1, 1.0),
        Learner(contrastive, encoder.model.backbone, tokenizer, encoder),
        Identity.of(found, order, args.gradient_accumulation_steps),
        validation,
        on_checkpoint,
        before,
        storage=storage,
        args=args,
        callbacks=[reporter, *callbacks],
    )
    reporter.trainer = made
    made.remove_callback(transformers.PrinterCallback)
    return made


def weights(trainer: StreamTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.encoder.model.named_parameters()}


def logged(trainer: StreamTrainer, *names: str) -> list[tuple]:
    history = trainer.state.log_history
    return [(e["step"], *(e[n] for n in names)) for e in history if all(n in e for n in names)]
