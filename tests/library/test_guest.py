"""The Python functions leave the program that calls them as it was, after a result, an error and an interrupt."""

import contextlib
import json
import logging
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from process_runtime import use_processes
from tiny import make_tiny

import raybge
from raybge.util.errors import UserError

WORDS = "what is a lane row block of the text that we read and sort by length in chunks on one node".split()
SMALL = dict(num_workers="1", cpus_per_worker=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a tiny model, groups, queries and their corpus."""
    folder = tmp_path_factory.mktemp("data")
    make_tiny(folder / "model")
    generator = np.random.default_rng(1)
    texts = [" ".join(generator.choice(WORDS, 8)) for _ in range(24)]
    groups = [{"query": text[:12], "pos": [text], "neg": texts[i - 3 : i - 1]} for i, text in enumerate(texts) if i > 3]
    (folder / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    corpus = [{"_id": str(i), "text": text} for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    queries = [{"query": text[:12], "pos": [text]} for text in texts[:8]]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    return folder


def process_state() -> dict[str, Any]:
    """Return the state that a call must not change."""
    return {
        "descriptors": [(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in (1, 2)],
        "streams": (id(sys.stdout), id(sys.stderr)),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "logging": (logging.root.level, list(logging.root.handlers), logging.raiseExceptions),
        "Ray's logging": logging.getLogger("ray").level,
        "excepthook": sys.excepthook,
        "warnings": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "environment": dict(os.environ),
        "random": repr(random.getstate()),
        "numpy": repr(np.random.get_state()),
        "torch": torch.random.get_rng_state().tolist(),
    }


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Check that the block leaves the process as it was."""
    before = process_state()
    try:
        yield
    finally:
        after = process_state()
        assert {name for name in before if before[name] != after[name]} == set()


@contextlib.contextmanager
def printing_thread(capfd: pytest.CaptureFixture) -> Iterator[None]:
    """Print lines from another thread during the block; check that all arrive on stdout."""
    stop, count = threading.Event(), [0]

    def work() -> None:
        while not stop.wait(0.02):
            print(f"another thread {count[0]}")
            count[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    output = capfd.readouterr().out
    lines = set(re.findall(r"another thread \d+", output))  # another line may stand between one and its line break
    assert count[0] > 5 and lines == {f"another thread {i}" for i in range(count[0])}


@contextlib.contextmanager
def interrupted(condition: Callable[[], bool]) -> Iterator[None]:
    """Send Ctrl-C to this process once the condition holds; the block must end with KeyboardInterrupt."""

    def work() -> None:
        while not condition():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        yield


def call(name: str, data: Path, output: Path, **more: Any) -> Any:
    """Call a Python function on the data, with its result in `output`."""
    model = str(data / "model")
    if name == "mine":
        flags = dict(input_file=str(data / "groups.jsonl"), output_file=str(output / "mined.jsonl"), negative_number=2)
        flags |= dict(model_name_or_path=model, range_for_sampling="0-10", overwrite=True)
        return raybge.mine_hard_negatives(**{**flags, **SMALL, **more})
    if name == "evaluate":
        flags = dict(encoder=model, query_data=str(data / "queries.jsonl"), corpus_data=str(data / "corpus.jsonl"))
        return raybge.evaluate_retrieval(**{**flags, **SMALL, **more})
    flags = dict(model_name_or_path=model, train_data=[str(data / "groups.jsonl")], output_dir=str(output / "run"))
    flags |= dict(overwrite_output_dir=True, max_steps=3, train_group_size=2, per_device_train_batch_size=4)
    return raybge.finetune(**{**flags, **SMALL, **more})


@pytest.fixture
def surroundings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have the calls join the Ray of this process, start one of their own, or train in plain processes."""
    if request.param == "joined Ray":
        request.getfixturevalue("ray_cluster")
    else:
        ray.shutdown()
    with use_processes() if request.param == "processes" else contextlib.nullcontext():
        yield


CALLS = pytest.mark.parametrize(
    ("name", "surroundings"),
    [
        ("mine", "joined Ray"),
        ("evaluate", "joined Ray"),
        ("finetune", "processes"),
        pytest.param("mine", "own Ray", marks=pytest.mark.alone),
        pytest.param("evaluate", "own Ray", marks=pytest.mark.alone),
        pytest.param("finetune", "own Ray", marks=pytest.mark.alone),
    ],
    indirect=["surroundings"],
)


@CALLS
def test_calls_leave_the_program_as_it_was(name, surroundings, data, tmp_path, capfd):
    """A result, an error of the user, a result again."""
    with printing_thread(capfd), unchanged():
        call(name, data, tmp_path)
    with unchanged(), pytest.raises(UserError, match="no_such_file"):
        flag = {"mine": "input_file", "evaluate": "query_data", "finetune": "train_data"}[name]
        call(name, data, tmp_path, **{flag: str(tmp_path / "no_such_file.jsonl")})
    with printing_thread(capfd), unchanged():
        call(name, data, tmp_path)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Have Ctrl-C interrupt this process: the background jobs of a shell ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def press_ctrl_c(*arguments: Any, **flags: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


@CALLS
def test_an_interrupt_leaves_the_program_as_it_was(name, surroundings, data, tmp_path, monkeypatch, capfd, ctrl_c):
    """Ctrl-C after the passages are encoded, or after a step of training."""
    if name == "finetune":
        run = tmp_path / "run"
        with unchanged(), interrupted(lambda: any(run.glob("checkpoint-*/raybge.json"))):
            call(name, data, tmp_path, max_steps=100_000, save_steps=5)
    else:
        module = {"mine": "raybge.mining.run", "evaluate": "raybge.evaluation.retrieval"}[name]
        monkeypatch.setattr(f"{module}.build_index", press_ctrl_c)
        with unchanged(), pytest.raises(KeyboardInterrupt):
            call(name, data, tmp_path)
    out, err = capfd.readouterr()
    assert ("continue with:\n  resume=True" in out + err) == (name == "finetune")
