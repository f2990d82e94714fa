"""Checks that the options of several commands share."""

from __future__ import annotations

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
