"""Run of a command: exit codes, one clean message, and a terminal that libraries cannot write to."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, RayTaskError, UserCodeException

import raybge
from raybge import row_log
from raybge.cli.console import Console
from raybge.cli.options import CommonOptions
from raybge.cli.run import resume_flags, run_command
from raybge.util.errors import UserError


@dataclass(kw_only=True)
class WorkOptions(CommonOptions):
    """A command for these tests."""


def raising(error):
    def function(options, console):
        print("noise of a library")
        os.write(2, b"noise of a native library\n")
        console.info("a line for the user")
        if error is not None:
            raise error

    return function


def wrapped(error):
    """An error raised in an actor, as Ray wraps it."""
    return RayTaskError("submit", "a long traceback\nof many lines", error)


def wrapped_by_ray_data(error):
    """An error raised in a function that Ray Data calls: only the text contains the cause."""
    text = f"ray::submit()\n  File a\n{type(error).__name__}: {error}\n\nThe above exception was the direct cause of"
    return RayTaskError("submit", f"{text} the following exception:\n\nray::b", UserCodeException("UDF failed"))


def circular_causes():
    """Two errors of Ray, each the cause of the other."""
    first, second = ActorDiedError(), NodeDiedError("a node died")
    first.__cause__, second.__cause__ = second, first
    return first


@pytest.mark.parametrize(
    ("argv", "flags"),
    [
        (["--a", "b c", "--d"], "--a 'b c' --d --resume"),
        (["--overwrite_output_dir", "True", "--resume", "--a=1"], "--a=1 --resume"),
        (["--resume_from_checkpoint", "x", "--a", "1"], "--a 1 --resume"),
        (["--token", "hf_1", "--token=hf_2", "--use_fast_tokenizer", "True"], "... --use_fast_tokenizer True --resume"),
    ],
)
def test_the_flags_that_continue_a_run(argv, flags):
    text = resume_flags(argv)
    assert text.endswith(flags) and "hf_" not in text


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (UserError("--x must be y"), 2, "raybge.work: --x must be y\n"),
        (KeyboardInterrupt(), 130, "raybge.work: interrupted\n"),
        (ValueError("broken"), 1, "raybge.work failed: ValueError: broken"),
        (wrapped(OSError(28, "No space left")), 1, "raybge.work failed: OSError: [Errno 28] No space left\n"),
        (wrapped_by_ray_data(OSError(28, "No space")), 1, "raybge.work failed: OSError: [Errno 28] No space\n"),
        (circular_causes(), 1, "raybge.work failed: NodeDiedError: a node died\n"),
    ],
)
def test_exit_codes_and_messages(capfd, error, code, message):
    assert run_command(WorkOptions, raising(error), "work", []) == code
    output = capfd.readouterr()
    assert "noise" not in output.out + output.err
    assert "Traceback" not in output.err
    assert output.err.startswith(message)
    log = re.search(r"log: (.*)", output.out)[1]
    content = Path(log).read_text()
    assert "noise of a library" in content and "noise of a native library" in content
    assert ("Traceback" in content) == (code == 1)
    assert "a line for the user" in output.out
    assert (log in output.err) == (code == 1)


def test_verbose_shows_the_messages_of_libraries(capfd):
    assert run_command(WorkOptions, raising(None), "work", ["--verbose"]) == 0
    assert "noise of a native library" in capfd.readouterr().err


def test_wrong_flags_end_with_2_and_no_log(capfd):
    assert run_command(WorkOptions, raising(None), "work", ["--nmu_workers", "2"]) == 2
    output = capfd.readouterr()
    assert "did you mean --num_workers?" in output.err
    assert output.out == ""


def silent(*lines, error=None):
    """Return a command that prints these lines; no library prints anything."""

    def function(options, console):
        for line in lines:
            console.info(line)
        if error:
            raise error

    return function


@pytest.mark.parametrize("error", [None, UserError("--x must be y"), KeyboardInterrupt()])
def test_no_empty_log_is_left(capfd, tmp_path, monkeypatch, error):
    """A command that ends before its first line does not mention the log either."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_command(WorkOptions, silent(error=error), "work", [])
    assert "log: " not in capfd.readouterr().out and not list(tmp_path.iterdir())
    run_command(WorkOptions, silent("a line", error=error), "work", [])
    assert re.match(rf"log: {tmp_path}/raybge-work-\S+\na line\n", capfd.readouterr().out)
    assert not list(tmp_path.iterdir())


def test_details_are_shown_with_verbose_only(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def function(options, console):
        console.detail("0 MB of keys")

    assert run_command(WorkOptions, function, "work", []) == 0
    (log,) = tmp_path.iterdir()
    assert "0 MB" not in capfd.readouterr().out and log.read_text() == "0 MB of keys\n"
    assert run_command(WorkOptions, function, "work", ["--verbose"]) == 0
    assert capfd.readouterr().out == "0 MB of keys\n"


def test_the_terminal_is_restored(capfd):
    console = Console()
    with console.capture("work", enabled=True), console.capture("inner", enabled=True):
        print("into the log")
    print("to the terminal")
    assert capfd.readouterr().out.endswith("to the terminal\n")


def test_a_table_is_aligned(capfd):
    Console().table(("", "before", "after"), [("nDCG@10", "0.5000", "0.6000"), ("MRR", "1", "2")])
    assert capfd.readouterr().out == "         before   after\nnDCG@10  0.5000  0.6000\nMRR           1       2\n"


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--help"], 0, "\n  train     Fine-tune an embedding model"),
        (["--version"], 0, f"raybge {raybge.__version__}"),
        (["prestrain"], 2, "is not a command"),
        (["frobnicate"], 2, "is not a command"),
        (["train", "--help"], 0, "usage: python -m raybge.train"),
    ],
)
def test_the_raybge_command(argv, code, text):
    run = [sys.executable, "-c", "from raybge.cli.run import main; main()", *argv]
    process = subprocess.run(run, capture_output=True, text=True)
    assert process.returncode == code
    assert text in process.stdout + process.stderr


@pytest.mark.parametrize("module", ["raybge", "raybge.train", "raybge.demo"])  # a short page is written only at exit
def test_help_ends_quietly_if_the_reader_closes_the_pipe(module):
    """`python -m raybge.train --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", module, "--help"]
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (process.returncode, process.stderr) == (0, "")


def test_the_row_log_names_what_is_missing(tmp_path, capsys):
    assert row_log.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"raybge.row_log: {tmp_path}/rows holds no row records")
    with pytest.raises(SystemExit) as exit_of:
        row_log.main([])
    assert exit_of.value.code == 2 and "required: output_dir" in capsys.readouterr().err


def test_a_stream_that_only_writes_is_no_terminal(monkeypatch):
    """Programs put adapters of their loggers in place of sys.stdout."""
    written: list[str] = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=written.append, flush=lambda: None))
    Console().info("a line")
    assert "".join(written) == "a line\n"
