"""The argparse parser of a command and its help page: flags in groups, aliases in one column after the description."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NoReturn

from raybge.cli.flag import Flag
from raybge.cli.options.common import FLAGEMBEDDING, GROUPS
from raybge.util.errors import UserError

WIDTH, NAME_COLUMN = 110, 40
COMMON = "flags that most runs set"


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, which raises UserError in place of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(message)


def argument_parser(
    description: str | None,
    flags: Iterable[Flag],
    prog: str,
    show_all: bool,
    examples: str = "",
    common: Mapping[str, str] | None = None,
) -> CommandParser:
    """Build the parser of a command.

    Args:
        description: first line of the help page.
        flags: flags of the command.
        prog: program name in the help page.
        show_all: list the TrainingArguments and the other flags of FlagEmbedding as well.
        examples: command lines that open the help page.
        common: flags that most runs set, which come first, with a text of one line each.

    Returns:
        The parser, with one argument per flag and one per alias.
    """
    flags = list(flags)
    parser = CommandParser(
        prog=prog,
        description="\n\n".join(filter(None, (description, examples))),
        usage=f"{prog} --flag value ...",
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=NAME_COLUMN, width=WIDTH),
    )
    common = common or {}
    position = {name: number for number, name in enumerate(common)}
    flags.sort(key=lambda f: position.get(f.name, len(position)))
    used = {f.group for f in flags if not f.required and f.name not in common}
    first = ("required", *([COMMON] if common else []))
    names = (*first, *(group for group in GROUPS if group in used), *sorted(used - {*GROUPS}))
    groups = {name: parser.add_argument_group(name) for name in names}
    for f in flags:
        group = "required" if f.required else COMMON if f.name in common else f.group
        hidden = _is_hidden(f) and f.name not in common and not show_all
        settings = _settings(f)
        text = _with_default(f, common[f.name]) if f.name in common else _help(f)
        groups[group].add_argument(f"--{f.name}", help=argparse.SUPPRESS if hidden else text, **settings)
        if f.aliases:  # the description lists them
            parser.add_argument(*(f"--{alias}" for alias in f.aliases), help=argparse.SUPPRESS, **settings)
    help_group = parser.add_argument_group("help")
    help_group.add_argument("--help", "-h", action="store_true", help="this page")
    if any(map(_is_hidden, flags)):
        help_group.add_argument("--help-all", action="store_true", help="this page and the flags that it leaves out")
    return parser


def print_and_exit(text: str) -> NoReturn:
    """Print a page and exit with code 0, also if the reader closes the pipe, as `| head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # Python would report it again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def _is_hidden(f: Flag) -> bool:
    return (f.transformers or f.group == FLAGEMBEDDING) and not f.required


def _settings(f: Flag) -> dict[str, Any]:
    """Return the keyword arguments of argparse's add_argument."""
    settings: dict[str, Any] = {"dest": f.name, "type": _reader(f)}
    if f.kind == "bool":
        return settings | {"nargs": "?", "const": True, "metavar": "BOOL"}
    settings |= {"nargs": "+"} if f.many else {}
    settings |= {"metavar": f.metavar or ("TEXT" if f.kind == "str" else f.kind.upper())}
    return settings | ({"choices": f.choices, "metavar": f.metavar or "|".join(f.choices)} if f.choices else {})


def _reader(f: Flag) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return f.read(text)
        except UserError as error:  # argparse would replace the message of a ValueError by its own
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"--{f.name}: ")) from error

    read.__name__ = f.kind  # argparse names the kind in its message
    return read


def _with_default(f: Flag, text: str) -> str:
    """Return the text of a common flag, one line with its default; its aliases are in the page of all flags."""
    default = "" if f.required or f.default in (None, False, -1) else f" (default: {f.default})"
    return (text + default).replace("%", "%%")


def _help(f: Flag) -> str:
    default = "" if f.required or f.default is None else f" (default: {f.default})"
    state = f" [refused: {f.refused}]" if f.refused else f" [no effect: {f.no_effect}]" if f.no_effect else ""
    aliases = f" [alias: {' '.join(f'--{alias}' for alias in f.aliases)}]" if f.aliases else ""
    return (f.help + default + state + aliases).replace("%", "%%")
