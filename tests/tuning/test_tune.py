"""A search with Ray Tune and Ray Train: trials, best model, and continuing after a kill."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import make_tiny

from raybge import train as train_module
from raybge.tune import main

WORDS = "what is a lane row block of the text that we read and sort by length in chunks on one node".split()
TRIALS = 2


def group(i: int) -> dict:
    """Return a group whose query shares words with its positive, which a model can learn."""
    random = np.random.default_rng(i)
    words = random.choice(WORDS, 8)
    negatives = [" ".join(random.choice(WORDS, 8)) for _ in range(2)]
    return {"query": " ".join(words[:4]) + f" {i}", "pos": [" ".join(words) + f" {i}"], "neg": negatives}


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    rows = [group(i) for i in range(160)]
    (folder / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = dict(
        model_name_or_path=make_tiny(folder / "tiny", dropout=0.1),
        train_data=folder / "groups.jsonl",
        per_device_train_batch_size=8,
        train_group_size=3,
        passage_max_len=16,
        num_train_epochs=1,
        held_out=0.2,
        num_samples=TRIALS,
        max_concurrent=1,
        scheduler="none",
        seed=3,
        cpus_per_worker=1,
    )
    return [*argv(values), "--search", "learning_rate=loguniform(1e-5,1e-2)", "temperature=choice(0.02,0.1)"]


def argv(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def trials_of(output: Path) -> list[dict]:
    return json.loads((output / "trials.json").read_text())["trials"] if (output / "trials.json").is_file() else []


def results(trials: list[dict]) -> list[tuple]:
    return [(trial["number"], trial["status"], trial["flags"], trial["curve"], trial["metrics"]) for trial in trials]


@pytest.fixture(scope="module")
def output(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "out"
    assert main([*flags, "--output_dir", str(folder)]) == 0
    return folder


def test_trials_are_sampled_and_evaluated(output):
    trials = trials_of(output)
    assert [trial["status"] for trial in trials] == ["finished"] * TRIALS
    assert len({trial["flags"]["learning_rate"] for trial in trials}) == TRIALS
    for trial in trials:
        assert 1e-5 <= trial["flags"]["learning_rate"] <= 1e-2 and trial["flags"]["temperature"] in (0.02, 0.1)
        steps = [step for step, _ in trial["curve"]]
        assert steps[0] == 0 and steps == sorted(set(steps)) and len(steps) >= 8
        assert trial["curve"][-1][1] == trial["metrics"]["nDCG@10"]
    assert len({trial["curve"][0][1] for trial in trials}) == 1  # the model before training is the same
    assert (output / "trials.csv").read_text().count("\n") == TRIALS + 1


def test_best_model_is_written_and_its_command_reproduces_it(output, tmp_path, capfd):
    trials = trials_of(output)
    best = max(trials, key=lambda trial: trial["metrics"]["nDCG@10"])
    assert (output / "best" / "modules.json").is_file()
    assert not list((output / "trials").glob("*/model"))
    result = json.loads((output / "best.json").read_text())
    assert result["flags"] == best["flags"] and result["metrics"] == best["metrics"]
    words = shlex.split(result["command"])
    assert words[:3] == ["python", "-m", "raybge.train"]
    again = tmp_path / "again"
    assert train_module.main([str(again) if word == "OUTPUT_DIR" else word for word in words[3:]]) == 0
    train_results = json.loads((again / "train_results.json").read_text())
    assert train_results["eval_nDCG@10"] == pytest.approx(best["metrics"]["nDCG@10"], abs=1e-6)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "modules.json"):  # one seed gives equal files
        assert (again / name).read_bytes() == (output / "best" / name).read_bytes()


@pytest.mark.alone  # kills processes
def test_killed_search_continues_with_equal_results(flags, output, tmp_path):
    """Kill the search with SIGKILL while the last trial runs; the first trial is not repeated."""
    continued = tmp_path / "out"
    command = [sys.executable, "-m", "raybge.tune", *flags, "--output_dir", str(continued)]
    path = os.pathsep.join(sys.path)
    program = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)
    limit = time.monotonic() + 240
    while not (len(trials_of(continued)) == 2 and trials_of(continued)[0]["status"] == "finished"):
        assert program.poll() is None, program.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.2)
    program.send_signal(signal.SIGKILL)
    program.wait()
    first = continued / "trials" / trials_of(continued)[0]["id"] / "result.json"
    written = first.stat().st_mtime_ns
    time.sleep(3)  # until its Ray has ended, too
    assert main([*flags, "--output_dir", str(continued), "--resume"]) == 0
    assert results(trials_of(continued)) == results(trials_of(output))
    assert first.stat().st_mtime_ns == written
