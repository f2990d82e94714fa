"""Ctrl-C and SIGTERM to a real `python -m raybge.train`: it saves, says how to continue, and continues."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from disturbed import argv, assert_same_model, make_flags

import raybge
from raybge.training.checkpoint.manifest import newest

LAST, SAVED = 90, 30  # updates
SECONDS = 240  # for a start


@dataclass
class Ended:
    """A run that was sent a signal: console, exit code, seconds from the signal until it said what it saved."""

    console: str
    code: int
    seconds: float

    @property
    def again(self) -> list[str]:
        """The command to continue."""
        return shlex.split(re.search(r"continue with: (.*)", self.console)[1])


def start(words: list[str], console: Path) -> subprocess.Popen:
    """In a session of its own, as in a terminal: a signal to the group reaches all that did not leave it."""
    root = Path(raybge.__file__).parents[1]
    # not the cluster that another test may have started meanwhile
    environment = {**os.environ, "PYTHONPATH": str(root), "RAY_ADDRESS": "local"}
    with open(console, "wb") as file:
        return subprocess.Popen(
            [sys.executable, *words[1:]],
            cwd=root,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )


def wait(what, process: subprocess.Popen, console: Path) -> None:
    limit = time.monotonic() + SECONDS
    while not what():
        assert process.poll() is None and time.monotonic() < limit, console.read_text()
        time.sleep(0.02)


def stopped(words: list[str], checkpoint: Path, number: int, console: Path) -> Ended:
    """Sent to the whole process group once there is a checkpoint."""
    process = start(words, console)
    try:
        wait(lambda: (checkpoint / "raybge.json").exists(), process, console)
        sent = time.monotonic()
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        wait(lambda: "continue with" in console.read_text(), process, console)
        seconds = time.monotonic() - sent
        process.wait(60)
    finally:
        process.kill()
    return Ended(console.read_text(), process.returncode, seconds)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A command that saves every SAVED of its updates."""
    flags = make_flags(tmp_path_factory.mktemp("given"))
    return ["python", "-m", "raybge.train", *argv({**flags, "num_train_epochs": LAST // 3, "save_steps": SAVED})]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stopped") / "out"


@pytest.fixture(scope="module")
def terminated(words, output) -> Ended:
    given = [*words, "--output_dir", str(output), "--overwrite_output_dir"]
    return stopped(given, output / f"checkpoint-{SAVED}", signal.SIGTERM, output.with_name("first"))


@pytest.fixture(scope="module")
def interrupted(terminated, output) -> Ended:
    return stopped(terminated.again, output / f"checkpoint-{2 * SAVED}", signal.SIGINT, output.with_name("second"))


def assert_saved(ended: Ended, output: Path) -> None:
    """The step that it says, which is none of those that are saved anyway."""
    step = int(re.search(r"saved checkpoint-(\d+)", ended.console)[1])
    assert (output / f"checkpoint-{step}" / "raybge.json").exists() and step % SAVED
    assert "Traceback" not in ended.console


def test_sigterm_saves_before_a_job_is_killed(terminated, output):
    """`ray job stop` waits for 3 seconds."""
    assert_saved(terminated, output)
    assert terminated.code == 143
    assert terminated.seconds < 3


def test_ctrl_c_saves(interrupted, output):
    assert_saved(interrupted, output)
    assert interrupted.code == 130


def test_the_command_that_is_printed_continues_the_run(words, interrupted, output, tmp_path):
    """Stopped twice, it ends with the weights of a run that was not."""
    for ending in ([*words, "--output_dir", str(tmp_path / "whole")], interrupted.again):
        process = start(ending, tmp_path / "console")
        assert process.wait(SECONDS) == 0, (tmp_path / "console").read_text()
    assert newest(output).step == LAST
    assert_same_model(output, tmp_path / "whole")
