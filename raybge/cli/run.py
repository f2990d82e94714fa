"""Run a command: parse its flags, keep the terminal clean, map errors to one message and an exit code.

Exit codes: 0 success, 1 failure, 2 an error that the user can correct, 130 interrupted (Ctrl-C), 143 terminated.
"""

from __future__ import annotations

import difflib
import importlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from raybge.cli.completion import complete
from raybge.cli.console import Console
from raybge.cli.help_page import print_and_exit
from raybge.cli.parser import build_options, declared_flags, parse_options, read_config
from raybge.cli.signatures import in_terms_of_arguments
from raybge.compat.library_versions import untested_versions
from raybge.util.errors import CORRECTABLE, failure_message
from raybge.util.process_state import preserve_process_state
from raybge.util.redaction import SECRET_FLAG, command_line
from raybge.util.versions import RAYBGE

COMMANDS = ("mine", "pretrain", "train", "tune", "merge", "evaluate", "encode", "export", "demo", "selftest", "runs")
MESSAGE_LINES = 5  # of a failure, shown on the terminal
Result = TypeVar("Result")
_REPORTED_VERSIONS: set[str] = set()


def run_command(
    options_class: type,
    function: Callable[[Any, Console], Any],
    name: str,
    argv: Sequence[str] | None,
    prog: str | None = None,
) -> int:
    """Run a command from its command line.

    Args:
        options_class: dataclass of the command's flags.
        function: implementation, called with the checked options and the console.
        name: name of the command.
        argv: words of the command line; None for those of this process.
        prog: how the command was started; default: `python -m raybge.NAME`.

    Returns:
        The exit code.
    """
    console = Console()
    argv, prog = command_line() if argv is None else argv, prog or f"python -m raybge.{name}"
    console.resume_command = f"{prog} {resume_flags(argv)}"
    try:
        options: Any = parse_options(options_class, argv, prog, console.info, examples_of(name))
        console.verbose = options.verbose
        _report_untested_versions(console)
        with console.capture(name, enabled=not options.verbose):
            try:
                function(options, console)
            except (*CORRECTABLE, KeyboardInterrupt):
                raise
            except Exception:
                console.log_traceback()
                raise
    except CORRECTABLE as error:
        console.error(f"raybge.{name}: {error}")
        return 2
    except KeyboardInterrupt:
        console.error(f"raybge.{name}: interrupted")
        return 130
    except Exception as error:
        log = f"\nThe full log is in {console.log_path}" if console.log_path else ""
        console.error(f"raybge.{name} failed: {_last_lines(failure_message(error))}{log}")
        return 1
    return 0


def call_command(options_class: type, function: Callable[[Any, Console], Result], values: Mapping[str, Any]) -> Result:
    """Run a command from Python; errors are raised, and the process is left as it was.

    Lines, bars and tables go to the program's own sys.stdout and sys.stderr. Output is not redirected: it may come from
    other threads.

    Args:
        options_class: dataclass of the command's flags.
        function: implementation, called with the checked options and the console.
        values: values by flag name.

    Returns:
        The result of `function`.
    """
    with errors_name_arguments(options_class):
        config = read_config(values.get("config"), declared_flags(options_class))
        lines: list[str] = []
        options: Any = build_options(options_class, {**config, **values}, lines.append)
        console = Console(shows_messages=options.verbose, keeps_ray=True, verbose=options.verbose)
        for line in lines:
            console.info(line)
        _report_untested_versions(console)
        with preserve_process_state():
            return function(options, console)


@contextmanager
def errors_name_arguments(options_class: type) -> Iterator[None]:
    """Name the arguments of a Python function, not flags, in the message of a UserError that leaves the block.

    Args:
        options_class: dataclass of the command's flags.
    """
    try:
        yield
    except CORRECTABLE as error:
        error.args = (in_terms_of_arguments(str(error), declared_flags(options_class).values()),)
        raise


def _report_untested_versions(console: Console) -> None:
    """Name the installed libraries whose versions are not tested; each once in a process."""
    for line in untested_versions():
        if line not in _REPORTED_VERSIONS:
            _REPORTED_VERSIONS.add(line)
            console.message(line)


def resume_flags(argv: Sequence[str]) -> str:
    """Return the flags that continue the run of `argv`, as shell text; values of secret flags become `...`."""
    words: list[str] = []
    name = ""
    for word in argv:
        is_flag = word.startswith("--")
        name, _, value = word.removeprefix("--").partition("=") if is_flag else (name, "", word)
        if name in ("resume", "resume_from_checkpoint", "overwrite_output_dir"):
            continue
        if SECRET_FLAG.search(name) and value:
            word = f"--{name}=..." if is_flag else "..."
        words.append(word)
    return shlex.join([*words, "--resume"])


def main() -> None:
    """Run `raybge COMMAND ...` and exit with the command's exit code."""
    complete()
    command, *rest = command_line() or ["--help"]
    if command == "help":
        command, *rest = [*rest[:1], "--help"]
    if command in COMMANDS:
        raise SystemExit(importlib.import_module(f"raybge.{command}").main(rest))
    if command in ("-h", "--help", "--version"):
        print_and_exit(f"raybge {RAYBGE}" if command == "--version" else _usage())
    similar = difflib.get_close_matches(command.lower(), COMMANDS, n=1, cutoff=0.7)
    remedy = f"did you mean {similar[0]}?" if similar else f"commands: {', '.join(COMMANDS)}"
    print(f"raybge: «{command}» is not a command; {remedy}", file=sys.stderr)
    raise SystemExit(2)


def _usage() -> str:
    lines = [f"  {name:<10}{_docstring(name).splitlines()[0]}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: raybge COMMAND --flag value ...",
            "",
            *lines,
            "",
            "`raybge help COMMAND` shows examples and flags, `raybge --version` the version.",
        ]
    )


def examples_of(command: str) -> str:
    """Return the command lines in the docstring of a command's module; "" for a job, which has none."""
    lines = [line for line in _docstring(command).splitlines() if line.startswith("    ")]
    return "\n".join(line for line in lines if not line.endswith("--help"))


def _docstring(command: str) -> str:
    return importlib.import_module(f"raybge.{command}").__doc__ or "" if command in COMMANDS else ""


def _last_lines(text: str) -> str:
    """Return the last lines: Ray puts the cause after the remote traceback."""
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-MESSAGE_LINES:])
