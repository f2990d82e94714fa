"""Disks and stores that fail now and then: a few tries, further and further apart, before a person is asked."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import pyarrow as pa

from raybge.util.errors import UserError, first_line

Result = TypeVar("Result")

WAITS = (1, 2, 4, 8, 15, 30)  # seconds between tries: a minute in all
QUICK = 3  # of them, where a person waits for the command to start

# What waiting does not mend.
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


def with_retries(action: Callable[[], Result], says: str, waits: Sequence[float] | None = None) -> Result:
    """What `action` returns, called again where a disk or a store refuses.

    UserError that begins with `says` where it goes on refusing; any other error is raised as it is. `waits` are the
    seconds before each further call, WAITS where they are left out.
    """
    left = list(WAITS if waits is None else waits)
    while True:
        try:
            return action()
        except Exception as error:
            if not _is_refusal(error):
                raise
            if not left or isinstance(error, _FINAL) or getattr(error, "errno", None) == errno.EROFS:
                raise UserError(f"{says} ({first_line(error)}){_advice(error)}") from error
            time.sleep(left.pop(0))


def _is_refusal(error: Exception) -> bool:
    """Whether a disk or a store is the cause. torch and safetensors say so in words alone."""
    if isinstance(error, OSError | pa.ArrowException):
        return True
    if type(error).__name__ == "SafetensorError":
        return "os error" in str(error)
    words = ("PytorchStreamWriter", "unexpected pos")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _advice(error: Exception) -> str:
    # torch knows no more than that its file is not as long as what it wrote.
    full = getattr(error, "errno", None) in _FULL or "os error 28" in str(error) or "unexpected pos" in str(error)
    return "; the disk is full: free some room, or keep fewer checkpoints with --save_total_limit" * full
