"""Exit codes, one clean message, and a console that others cannot write on."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, RayTaskError, UserCodeException

from raybge.cli import run as cli
from raybge.cli.console import Console
from raybge.cli.options import CommonOptions
from raybge.util.errors import UserError


@dataclass(kw_only=True)
class Arguments(CommonOptions):
    """A command for these tests."""


def raising(error):
    def function(arguments, console):
        print("noise of a library")
        os.write(2, b"noise of a native library\n")
        console.info("a line for the person")
        if error is not None:
            raise error

    return function


def wrapped(error):
    """As it comes out of an actor."""
    return RayTaskError("submit", "a long traceback\nof many lines", error)


def wrapped_by_ray_data(error):
    """As it comes out of a function that Ray Data calls: the cause is in the text alone."""
    said = f"ray::submit()\n  File a\n{type(error).__name__}: {error}\n\nThe above exception was the direct cause of"
    return RayTaskError("submit", f"{said} the following exception:\n\nray::b", UserCodeException("UDF failed"))


def in_a_circle():
    """Two errors of Ray that name each other as the cause."""
    first, second = ActorDiedError(), NodeDiedError("a node died")
    first.__cause__, second.__cause__ = second, first
    return first


@pytest.mark.parametrize(
    ("given", "again"),
    [
        (["--a", "b c", "--d"], "--a 'b c' --d --resume"),
        (["--overwrite_output_dir", "True", "--resume", "--a=1"], "--a=1 --resume"),
        (["--resume_from_checkpoint", "x", "--a", "1"], "--a 1 --resume"),
        (["--token", "hf_1", "--token=hf_2", "--use_fast_tokenizer", "True"], "... --use_fast_tokenizer True --resume"),
    ],
)
def test_the_command_that_continues_a_run(given, again):
    found = cli.continued(given)
    assert found.endswith(again) and "hf_" not in found


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (None, 0, ""),
        (UserError("--x must be y"), 2, "raybge.work: --x must be y\n"),
        (KeyboardInterrupt(), 130, "raybge.work: interrupted\n"),
        (ValueError("broken"), 1, "raybge.work failed: ValueError: broken"),
        (wrapped(OSError(28, "No space left")), 1, "raybge.work failed: OSError: [Errno 28] No space left\n"),
        (wrapped_by_ray_data(OSError(28, "No space")), 1, "raybge.work failed: OSError: [Errno 28] No space\n"),
        (in_a_circle(), 1, "raybge.work failed: NodeDiedError: a node died\n"),
    ],
)
def test_exit_codes_and_messages(capfd, error, code, says):
    assert cli.run(Arguments, raising(error), "work", []) == code
    shown = capfd.readouterr()
    assert "noise" not in shown.out + shown.err
    assert "Traceback" not in shown.err
    assert shown.err.startswith(says)
    log = re.search(r"log: (.*)", shown.out)[1]
    with open(log) as file:
        kept = file.read()
    assert "noise of a library" in kept and "noise of a native library" in kept
    assert ("Traceback" in kept) == (code == 1)
    assert "a line for the person" in shown.out
    assert (log in shown.err) == (code == 1)


def test_verbose_leaves_the_noise_on_the_screen(capfd):
    assert cli.run(Arguments, raising(None), "work", ["--verbose"]) == 0
    assert "noise of a native library" in capfd.readouterr().err


def test_wrong_flags_end_with_2_and_no_log(capfd):
    assert cli.run(Arguments, raising(None), "work", ["--nmu_workers", "2"]) == 2
    shown = capfd.readouterr()
    assert "did you mean --num_workers?" in shown.err
    assert shown.out == ""


def test_the_terminal_is_given_back(capfd):
    console = Console()
    with console.capture("work", enabled=True), console.capture("inner", enabled=True):
        print("into the log")
    print("onto the console")
    assert capfd.readouterr().out.endswith("onto the console\n")


def test_a_bar_shows_count_rate_and_time_left(capfd):
    with Console().bar("encode", 4, "texts") as bar:
        bar.update(4)
    shown = capfd.readouterr().err
    assert "encode" in shown and "4/4 texts" in shown and "texts/s" in shown


def test_a_table_is_aligned(capfd):
    Console().table(("", "before", "after"), [("nDCG@10", "0.5000", "0.6000"), ("MRR", "1", "2")])
    assert capfd.readouterr().out == "         before   after\nnDCG@10  0.5000  0.6000\nMRR           1       2\n"


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--help"], 0, "mine, pretrain, train, tune, merge, evaluate, encode, demo"),
        (["prestrain"], 2, "is not a command"),
        (["frobnicate"], 2, "is not a command"),
        (["train", "--help"], 0, "usage: python -m raybge.train"),
    ],
)
def test_the_console_entry(argv, code, says):
    run = [sys.executable, "-c", "from raybge.cli.run import main; main()", *argv]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == code
    assert says in done.stdout + done.stderr
