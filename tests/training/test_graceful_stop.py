"""Ctrl-C and SIGTERM to a real `python -m raybge.train`: it saves, prints how to resume, and resumes."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from faulty_runs import assert_same_model, make_flags, to_argv

import raybge
from raybge.training.checkpoint.manifest import latest_checkpoint

pytestmark = pytest.mark.alone

UPDATES, SAVE_STEPS = 90, 30
TIMEOUT = 240  # seconds for a start


@dataclass
class StoppedRun:
    """A run that received a signal: its console, exit code, and seconds from the signal until it reported the save."""

    console: str
    exit_code: int
    seconds: float

    @property
    def resume_command(self) -> list[str]:
        return shlex.split(re.search(r"continue with:\n  (.*)", self.console)[1])


def start(command: list[str], console: Path) -> subprocess.Popen:
    """Start in a session of its own, as in a terminal: a signal to the group reaches all processes that stay in it."""
    root = Path(raybge.__file__).parents[1]
    # RAY_ADDRESS: not the cluster of another test that runs at the same time.
    environment = {**os.environ, "PYTHONPATH": str(root), "RAY_ADDRESS": "local"}
    with open(console, "wb") as file:
        return subprocess.Popen(
            [sys.executable, *command[1:]],
            cwd=root,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
            # The background jobs of a shell ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, console: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, console.read_text()
        time.sleep(0.02)


def stop_after(checkpoint: Path, command: list[str], number: int, console: Path) -> StoppedRun:
    """Run the command, and send a signal once there is the checkpoint; SIGINT to the whole process group."""
    process = start(command, console)
    try:
        wait_until(lambda: (checkpoint / "raybge.json").exists(), process, console)
        sent = time.monotonic()
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        wait_until(lambda: "continue with" in console.read_text(), process, console)
        seconds = time.monotonic() - sent
        process.wait(60)
    finally:
        process.kill()
    return StoppedRun(console.read_text(), process.returncode, seconds)


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    """Return a command that saves a checkpoint every SAVE_STEPS updates."""
    flags = make_flags(tmp_path_factory.mktemp("inputs"))
    flags |= {"num_train_epochs": UPDATES // 3, "save_steps": SAVE_STEPS}
    return ["python", "-m", "raybge.train", *to_argv(flags)]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stopped") / "out"


@pytest.fixture(scope="module")
def terminated(command, output) -> StoppedRun:
    first = [*command, "--output_dir", str(output), "--overwrite_output_dir"]
    return stop_after(output / f"checkpoint-{SAVE_STEPS}", first, signal.SIGTERM, output.with_name("first"))


@pytest.fixture(scope="module")
def interrupted(terminated, output) -> StoppedRun:
    checkpoint = output / f"checkpoint-{2 * SAVE_STEPS}"
    return stop_after(checkpoint, terminated.resume_command, signal.SIGINT, output.with_name("second"))


def assert_saved(run: StoppedRun, output: Path) -> None:
    """Check that the reported checkpoint is complete, and not one of those that are saved regularly."""
    step = int(re.search(r"saved checkpoint-(\d+)", run.console)[1])
    assert (output / f"checkpoint-{step}" / "raybge.json").exists() and step % SAVE_STEPS
    assert "Traceback" not in run.console


def test_sigterm_saves_before_a_job_is_killed(terminated, output):
    """`ray job stop` kills after 3 seconds."""
    assert_saved(terminated, output)
    assert terminated.exit_code == 143
    assert terminated.seconds < 3


def test_ctrl_c_saves(interrupted, output):
    assert_saved(interrupted, output)
    assert interrupted.exit_code == 130


def test_printed_command_resumes_the_run(command, interrupted, output, tmp_path):
    """A run that was stopped twice ends with the weights of one that was not."""
    for last in ([*command, "--output_dir", str(tmp_path / "whole")], interrupted.resume_command):
        process = start(last, tmp_path / "console")
        assert process.wait(TIMEOUT) == 0, (tmp_path / "console").read_text()
    assert latest_checkpoint(output).step == UPDATES
    assert_same_model(output, tmp_path / "whole")
