"""Ray calls whose results are wanted in order, a few under way at a time, with errors a person can read."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from raybge.util.errors import UserError, causes


def results_in_order(calls: Iterable[tuple[Any, ...]], window: int | None = None) -> Iterator[Any]:
    """Results of Ray calls, each (function that gives a reference, its arguments...), in their order.

    At most `window` are under way, by default twice the cluster's CPUs.
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
    """A UserError raised in a Ray worker comes out as it was, without Ray's wrappers around it."""
    try:
        yield
    except Exception as error:
        for cause in causes(error):
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from None
        # of an actor that could not start, Ray keeps the traceback's text alone
        if said := re.findall(rf"^{UserError.__module__}.UserError: (.+)$", str(error), re.MULTILINE):
            raise UserError(said[-1]) from None
        raise
