"""Retries of disk and object store operations that fail now and then, with growing pauses."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import pyarrow as pa

from raybge.util.errors import UserError, first_line

Result = TypeVar("Result")

WAITS = (1, 2, 4, 8, 15, 30)  # seconds between tries: one minute in total
QUICK = 3  # number of these pauses while a person waits for the command to start

# Errors that no retry corrects.
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    pa.ArrowInvalid,
    NotImplementedError,
)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def with_retries(action: Callable[[], Result], message: str, waits: Sequence[float] | None = None) -> Result:
    """Call `action` until no disk or store error occurs.

    Args:
        action: called without arguments.
        message: begins the error's message.
        waits: seconds before each further call; default: WAITS.

    Returns:
        The result of `action`.

    Raises:
        UserError: the disk or store still fails after the last try, or with an error that no retry corrects. Any other
            error is raised as it is.
    """
    pauses = list(WAITS if waits is None else waits)
    while True:
        try:
            return action()
        except Exception as error:
            if not _is_storage_error(error):
                raise
            if not pauses or isinstance(error, _FINAL) or getattr(error, "errno", None) == errno.EROFS:
                raise UserError(f"{message} ({first_line(error)}){_advice(error)}") from error
            time.sleep(pauses.pop(0))


def _is_storage_error(error: Exception) -> bool:
    """Return True if a disk or a store is the cause; torch and safetensors only say so in their message."""
    if isinstance(error, OSError | pa.ArrowException):
        return True
    if type(error).__name__ == "SafetensorError":
        return "os error" in str(error)
    words = ("PytorchStreamWriter", "unexpected pos")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _advice(error: Exception) -> str:
    # torch only reports that its file is shorter than what it wrote
    full = getattr(error, "errno", None) in _FULL or "os error 28" in str(error) or "unexpected pos" in str(error)
    return "; the disk is full: free some space, or keep fewer checkpoints with --save_total_limit" * full
