"""Current activity of this process's training, readable from another thread while the training thread is blocked.

All workers enter the same collectives in the same order. Of two workers, the one that has entered fewer collectives is
the one that the other waits for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

STARTING, READING, DONE = "starting", "waiting for data", "done"


@dataclass(frozen=True)
class Activity:
    """One activity of the training thread.

    Args:
        name: the activity, as it appears in error messages.
        started: when it began (`time.monotonic()`, seconds).
        collectives: number of collectives entered so far, including those of this activity.
        is_collective: the activity is a collective: the worker only waits for the others.
        has_collective: the activity contains a collective next to the worker's own computation.
        phase: name for the person who watches the run; empty for a part of a step.
    """

    name: str
    started: float
    collectives: int
    is_collective: bool = False
    has_collective: bool = False
    phase: str = ""


_current = Activity(STARTING, time.monotonic(), 0)


def current_activity() -> Activity:
    """Return the activity of this process right now."""
    return _current


def reset_activity() -> None:
    """Start a new run: activity STARTING, no collectives entered."""
    global _current
    _current = Activity(STARTING, time.monotonic(), 0)


def set_activity(name: str, has_collective: bool = False) -> None:
    """Replace the current activity.

    Args:
        name: the activity, as it appears in error messages.
        has_collective: the activity contains a collective next to the worker's own computation.
    """
    global _current
    collectives = _current.collectives + has_collective
    _current = Activity(name, time.monotonic(), collectives, has_collective=has_collective, phase=_current.phase)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name the block for the person who watches the run; the activity is that of the code within."""
    global _current
    previous = _current.phase
    _current = replace(_current, phase=name)
    try:
        yield
    finally:
        _current = replace(_current, phase=previous)


@contextmanager
def activity(name: str) -> Iterator[None]:
    """Set the activity within the block and restore the name of the previous one afterwards."""
    previous = _current
    set_activity(name)
    try:
        yield
    finally:
        set_activity(previous.name)


@contextmanager
def collective(name: str) -> Iterator[None]:
    """Mark the block as a collective, in which this worker waits for all others."""
    global _current
    previous = _current
    _current = Activity(name, time.monotonic(), previous.collectives + 1, is_collective=True, phase=previous.phase)
    try:
        yield
    finally:
        _current = replace(previous, started=time.monotonic(), collectives=_current.collectives, is_collective=False)
