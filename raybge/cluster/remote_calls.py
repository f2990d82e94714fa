"""Calls of Ray tasks and actors: results in order, a limited number under way, readable errors."""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from raybge.util.errors import UserError, causes
from raybge.util.filesystem import StorageError

_NAMES = "|".join(re.escape(f"{each.__module__}.{each.__qualname__}") for each in (UserError, StorageError))
_MESSAGE = re.compile(rf"^(?:{_NAMES}): (.+)$", re.MULTILINE)


def ray_is_connected() -> bool:
    """Return True if this process is connected to a Ray cluster; Ray is not imported."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def results_in_order(calls: Iterable[tuple[Any, ...]], window: int | None = None) -> Iterator[Any]:
    """Make Ray calls and yield their results in the order of the calls.

    If the caller stops early, the calls under way run to their end: Ray aborts the process if a task ends while it is
    being cancelled («Tried to complete task that was not pending», Ray 2.60).

    Args:
        calls: for each call a function that returns a reference, and its arguments.
        window: calls under way at a time; default: twice the cluster's CPUs, so that every core is busy.

    Yields:
        The result of each call.

    Raises:
        UserError: a call raised it; without Ray's wrappers.
    """
    import ray

    window = window or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    pending: deque[Any] = deque()
    with unwrap_user_errors():
        for function, *arguments in calls:
            if len(pending) >= window:
                yield ray.get(pending.popleft())
            pending.append(function(*arguments))
        while pending:
            yield ray.get(pending.popleft())


@contextmanager
def unwrap_user_errors() -> Iterator[None]:
    """Raise a UserError of a Ray worker as it was raised there, without Ray's wrappers around it."""
    try:
        yield
    except Exception as error:
        for cause in causes(error):
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from None
        # If an actor could not start, Ray keeps only the text of the traceback.
        if messages := _MESSAGE.findall(str(error)):
            raise UserError(messages[-1]) from None
        raise
