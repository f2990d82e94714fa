"""Shared by all soak tests: number of inputs, count of inputs by kind, and the time limit of one input."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis

INPUTS = int(os.environ.get("SOAK_INPUTS", 100_000))
SECONDS = 20  # an input that takes longer hangs
TRIED: Counter[str] = Counter()


def share(percent: int) -> hypothesis.settings:
    """Return settings for a share of all inputs, with new inputs in every run.

    A failing input is printed; a test for it belongs into the ordinary suite.
    """
    return hypothesis.settings(
        max_examples=INPUTS * percent // 100,
        derandomize=False,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


class Hangs(BaseException):
    """An input hangs; not a subclass of Exception, so that raybge cannot catch it."""


@contextmanager
def tried(kind: str) -> Iterator[None]:
    """Count an input of a kind, and interrupt it if it hangs."""

    def stop(*_: object) -> None:
        raise Hangs(f"an input took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    TRIED[kind] += 1
