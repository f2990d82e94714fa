"""What this process's training is doing, for a thread that asks: training itself cannot answer when it hangs.

Every worker passes the same collectives in the same order. Of two workers, the one that has entered fewer of them is
the one that the other waits for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STARTING, READING, DONE = "starting", "waiting for data", "done"


@dataclass(frozen=True)
class Place:
    """What is being done since when (`time.monotonic()`), and how many collectives were entered before and with it.

    `waits`: it is a collective, and does nothing but wait for others. `shared`: it has one in it, beside its own work.
    """

    doing: str
    since: float
    collectives: int
    waits: bool = False
    shared: bool = False


_place = Place(STARTING, time.monotonic(), 0)


def here() -> Place:
    """The place right now."""
    return _place


def begin() -> None:
    """A run starts."""
    global _place
    _place = Place(STARTING, time.monotonic(), 0)


def at(doing: str, shared: bool = False) -> None:
    """From now on this is done."""
    global _place
    _place = Place(doing, time.monotonic(), _place.collectives + shared, shared=shared)


@contextmanager
def during(doing: str) -> Iterator[None]:
    """This is done in the block, and afterwards what was done before."""
    before = _place
    at(doing)
    try:
        yield
    finally:
        at(before.doing)


@contextmanager
def collective(doing: str) -> Iterator[None]:
    """The block waits for all workers."""
    global _place
    before = _place
    _place = Place(doing, time.monotonic(), before.collectives + 1, waits=True)
    try:
        yield
    finally:
        _place = Place(before.doing, time.monotonic(), _place.collectives, shared=before.shared)
