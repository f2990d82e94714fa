"""What every test here shares: how many inputs there are, how many were tried, and how long one may take."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

INPUTS = int(os.environ.get("SOAK_INPUTS", 100_000))
SECONDS = 20  # an input that takes longer hangs
TRIED: Counter[str] = Counter()


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
