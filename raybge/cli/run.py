"""Run a command: parse, keep the console clean, turn errors into one message and an exit code.

Exit codes: 0 done, 1 failed, 2 something the person can mend, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from raybge.cli.console import Console
from raybge.cli.parser import build, parse
from raybge.util.errors import UserError, failure
from raybge.util.redaction import SECRET, command_line

COMMANDS = ("mine", "pretrain", "train", "tune", "merge", "evaluate", "encode", "demo")
Result = TypeVar("Result")


def run(
    arguments: type,
    function: Callable[[Any, Console], Any],
    name: str,
    argv: Sequence[str] | None,
    prog: str | None = None,
) -> int:
    """Parse `argv` into `arguments`, call `function(parsed, console)`, return the exit code.

    `prog` is how the command is started, by default `python -m raybge.NAME`.
    """
    console = Console()
    argv, prog = command_line() if argv is None else argv, prog or f"python -m raybge.{name}"
    console.again = f"{prog} {continued(argv)}"
    try:
        parsed: Any = parse(arguments, argv, prog)
        with console.capture(name, enabled=not parsed.verbose):
            try:
                function(parsed, console)
            except (UserError, KeyboardInterrupt):
                raise
            except Exception:
                console.log_traceback()
                raise
    except UserError as error:
        console.error(f"raybge.{name}: {error}")
        return 2
    except KeyboardInterrupt:
        console.error(f"raybge.{name}: interrupted")
        return 130
    except Exception as error:
        where = f"\nThe whole story is in {console.log_path}" if console.log_path else ""
        console.error(f"raybge.{name} failed: {_last_lines(failure(error))}{where}")
        return 1
    return 0


def call(arguments: type, function: Callable[[Any, Console], Result], name: str, flags: Mapping[str, Any]) -> Result:
    """The same from Python: flags by name, the function's result, and errors as they are raised."""
    built: Any = build(arguments, flags)
    console = Console()
    with console.capture(name, enabled=not built.verbose):
        return function(built, console)


def continued(argv: Sequence[str]) -> str:
    """The same flags as text, with --resume and without what does not go with it; secrets are left out."""
    words: list[str] = []
    name = ""
    for word in argv:
        is_flag = word.startswith("--")
        name, _, value = word.removeprefix("--").partition("=") if is_flag else (name, "", word)
        if name in ("resume", "resume_from_checkpoint", "overwrite_output_dir"):
            continue
        if SECRET.search(name) and value:
            word = f"--{name}=..." if is_flag else "..."
        words.append(word)
    return shlex.join([*words, "--resume"])


def main() -> None:
    """The console entry `raybge COMMAND ...`."""
    command, *rest = command_line() or ["--help"]
    if command in COMMANDS:
        raise SystemExit(importlib.import_module(f"raybge.{command}").main(rest))
    if command in ("-h", "--help"):
        print("usage: raybge COMMAND --flag value ...\n\ncommands: " + ", ".join(COMMANDS))
        print("`raybge COMMAND --help` lists a command's flags.")
        raise SystemExit(0)
    print(f"raybge: «{command}» is not a command; commands: {', '.join(COMMANDS)}", file=sys.stderr)
    raise SystemExit(2)


def _last_lines(text: str, count: int = 5) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    # Ray puts the cause last, after the remote traceback.
    return "\n".join(lines if len(lines) <= count else lines[-count:])
