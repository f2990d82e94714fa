"""Signatures and argument lists of the Python functions, from the declarations of the commands' flags.

`options/*_keywords.py` hold the same for type checkers and editors; cli/keyword_source.py writes them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal, TypeVar

from raybge.cli.flag import Flag
from raybge.cli.options.common import GROUPS
from raybge.cli.parser import declared_flags

Function = TypeVar("Function", bound=Callable[..., Any])

_TYPES: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str | Path,
    "json": dict[str, Any] | str | Path,
}
_LISTS: dict[str, Any] = {"int": Sequence[int], "float": Sequence[float], "str": Sequence[str | Path]}


def with_keywords(options_class: type) -> Callable[[Function], Function]:
    """Return a decorator that lists a command's flags in the signature and the docstring of a function with `**flags`.

    Args:
        options_class: dataclass of the command's flags.

    Returns:
        The decorator. `help`, notebooks and `inspect.signature` read what it sets; a call of the function is unchanged.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        named = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        flags = [f for f in accepted_flags(options_class) if f.name not in signature.parameters]
        keywords = [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if f.required else f.default,
                annotation=keyword_type(f),
            )
            for f in flags
        ]
        described: Any = function
        described.__signature__ = signature.replace(parameters=[*named, *keywords])
        lines = "\n".join(f"    {f.name}: {_description(f)}" for f in flags)
        function.__doc__ = f"{inspect.getdoc(function)}\n\nFlags:\n{lines}\n"
        return function

    return decorate


def accepted_flags(options_class: type) -> list[Flag]:
    """Return the flags that have an effect, in the order of the help page: required ones first."""
    flags = [f for f in declared_flags(options_class).values() if not (f.refused or f.no_effect)]
    order = {group: number for number, group in enumerate(GROUPS)}
    return sorted(flags, key=lambda f: (not f.required, order.get(f.group, len(order))))


def keyword_type(f: Flag) -> Any:
    """Return the type of the values that a Python caller may pass for a flag.

    Args:
        f: the flag.

    Returns:
        A type such as `float`, `Literal["cls", "mean"]` or `str | Path | Sequence[str | Path]`; None is among the
        values if it is the default.
    """
    unset = () if f.default is not None else (None,)
    if f.choices:
        return Literal[(*f.choices, *unset)]
    kinds = [_TYPES[f.kind], _LISTS[f.kind]] if f.many else [_TYPES[f.kind]]
    if f.metavar == "N":  # a number of workers, or a range of numbers
        kinds.append(int)
    return reduce(or_, (*kinds, *unset))


def in_terms_of_arguments(message: str, flags: Iterable[Flag]) -> str:
    """Return a message about flags as one about the arguments of a Python function.

    Args:
        message: text that names flags, for example "--score_only requires --cross_encoder".
        flags: the command's flags.

    Returns:
        The text with `score_only` for `--score_only`, and `on_bad_rows="skip"` for `--on_bad_rows skip`.
    """
    by_spelling = {spelling: f for f in flags for spelling in f.spellings}

    def argument(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        f = by_spelling.get(name)
        if value is None:
            return name
        if f and f.choices and value in f.choices:
            return f'{name}="{value}"'
        return f"{name}={value}" if value in ("True", "False") else f"{name} {value}"

    message = re.sub(r"(?<![\w-])--(?P<name>[a-z]\w*)(?: (?P<value>[\w-]+))?", argument, message)
    return message.replace("there is no flag", "there is no argument").replace("; help lists them", "")


def _description(f: Flag) -> str:
    default = "" if f.default in (None, MISSING) else f" (default: {f.default!r})"
    aliases = f" [alias: {', '.join(f.aliases)}]" if f.aliases else ""
    return f.help + default + aliases
