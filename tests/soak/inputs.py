"""What every test here shares: how many inputs there are, how many were tried, and how long one may take."""

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
    """So many of all inputs, others in every run: what one finds is printed, and gets a test of its own in the ordinary
    suite.
    """
    return hypothesis.settings(
        max_examples=INPUTS * percent // 100,
        derandomize=False,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


class Hangs(BaseException):
    """Nothing that the product catches."""


@contextmanager
def tried(kind: str) -> Iterator[None]:
    """Count an input of a kind, and end it where it hangs."""

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
