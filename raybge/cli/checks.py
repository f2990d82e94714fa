"""Checks that the options of several commands share."""

from __future__ import annotations

from typing import Any

from raybge.cli.parser import declared_flags
from raybge.util.errors import UserError


def check_at_least(least: int, options: object, *names: str) -> None:
    """Check the lower bound of numeric flags; unset flags (None) pass.

    Args:
        least: the lowest accepted value.
        options: the command's options object.
        *names: names of its fields.

    Raises:
        UserError: a flag is below `least`.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise UserError(f"--{name} must be at least {least}, found {value}")


def check_requires(options: Any, name: str, other: str) -> None:
    """Check that a flag that has no effect without another one is not set alone.

    Args:
        options: the command's options object.
        name: name of the flag's field.
        other: name of the field that it requires; unset if None or False.

    Raises:
        UserError: `name` is not at its default and `other` is unset.
    """
    is_set = getattr(options, name) != declared_flags(type(options))[name].default
    needed = getattr(options, other)
    if is_set and (needed is None or needed is False):
        raise UserError(f"--{name} requires --{other}")
