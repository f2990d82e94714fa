"""Small runs of two workers, and faults in the middle of them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import make_tiny

from raybge.training import controller, worker
from raybge.training.trainer import StreamTrainer

WORDS = "what is a lane row block of the text that we read and sort by length in chunks on one node".split()
UPDATES = 6  # of a run: 2 epochs of 3 steps


def make_flags(folder: Path) -> dict:
    """Write model and data into a folder; return flags of a run with two workers and a checkpoint every 2 updates.

    The model has dropout, so that the random state counts.
    """

    def group(i: int) -> dict:
        random = np.random.default_rng(i)
        query, *texts = (" ".join(random.choice(WORDS, n)) for n in (3, 8, 8, 8))
        return {"query": query, "pos": texts[:1], "neg": texts[1:]}

    (folder / "groups.jsonl").write_text("".join(json.dumps(group(i)) + "\n" for i in range(16)))
    return dict(
        model_name_or_path=make_tiny(folder / "tiny", dropout=0.1),
        train_data=[str(folder / "groups.jsonl")],
        global_batch_size=6,
        train_group_size=3,
        learning_rate=1e-3,
        num_train_epochs=2,
        temperature=0.1,
        logging_steps=1,
        num_workers="2",
        cpus_per_worker=1,
        passage_max_len=16,
        save_steps=2,
    )


def to_argv(flags: dict) -> list[str]:
    """Return flags as words of a command line."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def before_each_step(monkeypatch, action: Callable[[StreamTrainer, dict], None]) -> None:
    """Have every worker call `action(trainer, inputs)` before each training step."""

    def train_worker(settings: dict) -> None:
        original = StreamTrainer.training_step

        def training_step(self, model, inputs, *args):
            action(self, inputs)
            return original(self, model, inputs, *args)

        StreamTrainer.training_step = training_step
        try:
            worker.train_worker(settings)
        finally:
            StreamTrainer.training_step = original

    monkeypatch.setattr(controller, "_train_worker", train_worker)


@contextmanager
def full_disk_after_step(step: int) -> Iterator[None]:
    """Expect that a run in the block ends for want of disk space before the step after `step`."""

    def fail(trainer: StreamTrainer, inputs: dict) -> None:
        if trainer.state.global_step == step:
            raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception, match="No space left"):
        before_each_step(patch, fail)
        yield


def assert_same_model(output: Path, expected: Path) -> None:
    """Check that two model folders have equal weights."""
    actual_weights, expected_weights = (load_file(folder / "model.safetensors") for folder in (output, expected))
    assert actual_weights.keys() == expected_weights.keys()
    for name, value in actual_weights.items():
        np.testing.assert_allclose(value, expected_weights[name], atol=1e-6, rtol=0, err_msg=name)
