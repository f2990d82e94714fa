"""Small runs of two workers, and faults in the middle of them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray
from safetensors.numpy import load_file
from tiny import make_tiny

from raybge.training import controller as launch
from raybge.training import worker as loop
from raybge.training.trainer import StreamTrainer

WORDS = "what is a lane row block of the text that we read and sort by length in chunks on one node".split()
LAST = 6  # updates of a run: 2 epochs of 3 steps


def start_ray(*modules: str) -> None:
    """With workers that know these test modules, which they cannot import."""
    for module in (__name__, "tiny", *modules):
        ray.cloudpickle.register_pickle_by_value(sys.modules[module])
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)


def make_flags(folder: Path) -> dict:
    """With dropout: the random state counts. Two workers, a checkpoint every 2 updates."""

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


def argv(flags: dict) -> list[str]:
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def before_each_step(monkeypatch, act: Callable[[StreamTrainer, dict], None]) -> None:
    """Have `act(trainer, inputs)` run in every worker before each training step."""

    def disturbed(settings: dict) -> None:
        whole = StreamTrainer.training_step

        def training_step(self, model, inputs, *args):
            act(self, inputs)
            return whole(self, model, inputs, *args)

        StreamTrainer.training_step = training_step
        try:
            loop.train_worker(settings)
        finally:
            StreamTrainer.training_step = whole

    monkeypatch.setattr(launch, "_train_worker", disturbed)


def assert_same_model(output: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=1e-6, rtol=0, err_msg=name)
