"""Declaration of one flag, and conversion of its values from text, YAML and Python."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from raybge.util.errors import UserError

KIND_NAMES = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "json": "a JSON object or the path of one",
}
_TYPES = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,), "json": (dict,)}


@dataclass(frozen=True)
class Flag:
    """A flag of a command.

    Attributes:
        name: canonical name, without the dashes.
        kind: "bool", "int", "float", "str" or "json".
        many: the flag takes a list of values.
        default: value if unset; MISSING if the flag is required.
        group: heading in the help page.
        help: description in the help page.
        aliases: other accepted spellings.
        choices: accepted values; None for any.
        metavar: placeholder of the value in the help page.
        refused: reason why setting the flag stops the command; None if it is accepted.
        transformers: the flag belongs to transformers.TrainingArguments.
        no_effect: reason why setting the flag changes nothing, which the command prints; None if it has an effect.
        or_bool: Python and YAML may give True or False in place of a text.
    """

    name: str
    kind: str
    many: bool
    default: Any
    group: str
    help: str
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    refused: str | None = None
    transformers: bool = False
    no_effect: str | None = None
    or_bool: bool = False

    @property
    def required(self) -> bool:
        """True if the command does not start without the flag."""
        return self.default is MISSING

    @property
    def spellings(self) -> tuple[str, ...]:
        """The name and the aliases, without the dashes."""
        return (self.name, *self.aliases)

    def read(self, text: str) -> Any:
        """Convert one value from the command line.

        Args:
            text: one word of the command line.

        Returns:
            The value of the flag's kind.

        Raises:
            UserError: a JSON file cannot be read.
            ValueError: the text is not of the flag's kind.
        """
        try:
            return READERS[self.kind](text)
        except UserError as error:
            raise UserError(f"--{self.name}: {error}") from error

    def convert(self, value: Any) -> Any:
        """Convert a value from YAML or Python to the flag's kind.

        Args:
            value: a text as on the command line, or an object; None stands for an unset flag.

        Returns:
            The value of the flag's kind, a list of them for a flag with many values, or None.

        Raises:
            UserError: the value is of another kind, or not one of `choices`.
        """
        if isinstance(value, Path):
            value = str(value)
        if value is None or (self.or_bool and isinstance(value, bool)):
            return value
        if self.many:
            values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            return [dataclasses.replace(self, many=False).convert(each) for each in values]
        try:
            if isinstance(value, str) and self.kind != "str":
                value = self.read(value)
        except UserError:
            raise
        except (ValueError, argparse.ArgumentTypeError):
            raise UserError(f"--{self.name} takes {KIND_NAMES[self.kind]}, found «{value}»") from None
        if self.kind == "str" and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # YAML reads `num_workers: 2` as a number
        bool_as_number = isinstance(value, bool) and self.kind in ("int", "float")
        not_a_number = isinstance(value, float) and math.isnan(value)
        if not isinstance(value, _TYPES[self.kind]) or bool_as_number or not_a_number:
            raise UserError(f"--{self.name} takes {KIND_NAMES[self.kind]}, found {value!r}")
        if self.choices and value not in self.choices:
            raise UserError(f"--{self.name} takes one of {', '.join(self.choices)}, found «{value}»")
        return value


def flag(
    default: Any,
    group: str,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    refused: str | None = None,
) -> Any:
    """Declare a flag as a dataclass field.

    Args:
        default: value if unset; `...` makes the flag required.
        group: heading in the help page.
        help: description in the help page.
        aliases: other accepted spellings.
        choices: accepted values.
        metavar: placeholder of the value in the help page.
        refused: reason why setting the flag stops the command.

    Returns:
        The field, for a dataclass of options.
    """
    metadata = dict(group=group, help=help, aliases=aliases, choices=choices, metavar=metavar, refused=refused)
    return dataclasses.field(default=MISSING if default is ... else default, metadata=metadata)


def as_json(text: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        text: the object if it starts with `{`, else the path of a file that contains it.

    Returns:
        The object.

    Raises:
        UserError: the file cannot be read, or the content is not a JSON object.
    """
    try:
        content = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    except OSError as error:
        raise UserError(f"cannot read {text}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{text} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{text}: expected a JSON object, found {type(content).__name__}")
    return content


def _as_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected True or False, found «{text}»")
    return text.lower() in ("true", "1", "yes")


def _as_float(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError(text)  # nan would pass every range check
    return value


READERS: dict[str, Callable[[str], Any]] = {
    "bool": _as_bool,
    "int": int,
    "float": _as_float,
    "str": str,
    "json": as_json,
}
