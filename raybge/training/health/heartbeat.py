"""Workers that stand still: each says in a thread of its own what its training does, and who is missing follows.

`Heart` runs in the worker, `stalled` where all pulses are known.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from raybge.util import activity as whereabouts
from raybge.util.activity import DONE, READING, STARTING, Place

if TYPE_CHECKING:
    from raybge.training.health.run_state import Board

SHORTEST, LONGEST = 0.5, 10.0  # seconds between two pulses: 51 a second of 512 workers
LISTENING = 0.2  # those of worker 0, which hears by them that the run is to stop
NAMED = 3  # workers of a message


class StallError(RuntimeError):
    """Workers wait for one that does not come."""


@dataclass(frozen=True)
class Pulse:
    """What a worker said of itself, `heard` seconds ago: where it then was for `seconds`."""

    rank: int
    address: str
    pid: int
    place: Place
    seconds: float
    heard: float = 0.0

    @property
    def still(self) -> float:
        """Seconds without a change that is known of."""
        return self.seconds + self.heard

    def __str__(self) -> str:
        return f"worker {self.rank} ({self.address}, pid {self.pid})"


def stalled(pulses: Sequence[Pulse], timeout: float) -> str | None:
    """Who keeps the others waiting for more than `timeout` seconds, None where nobody does.

    A worker that has not begun its first step is not judged while it is heard of, nor does anyone wait for it in vain:
    that one is slow.
    """
    if any(pulse.place.doing == STARTING and pulse.heard <= timeout for pulse in pulses):
        return None
    running = [pulse for pulse in pulses if pulse.place.doing != DONE]
    silent = [f"{pulse} has not been heard of for {pulse.heard:.0f} s" for pulse in running if pulse.heard > timeout]
    still = [pulse for pulse in running if pulse.still > timeout]
    reading = [pulse for pulse in still if pulse.place.doing == READING and pulse.heard <= timeout]
    waiting = [pulse for pulse in still if pulse.place.waits or pulse.place.shared]
    front = max((pulse.place.collectives for pulse in waiting), default=0)
    behind = [p for p in still if p.place.collectives < front and p not in reading and p.heard <= timeout]
    missing = silent + [f"{pulse} has been in {pulse.place.doing} for {pulse.still:.0f} s" for pulse in behind]
    missing += [f"{pulse} has been {READING} for {pulse.still:.0f} s" for pulse in reading]
    if not missing and not any(pulse.place.waits for pulse in waiting):
        return None
    says = _some(missing) if missing else f"none of the {len(running)} workers is missing"
    others = [p for p in waiting if p.place.collectives == front and p.heard <= timeout]
    return says + (f"; {len(others)} wait in {others[0].place.doing}" if others else "")


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    return "; ".join(names[:NAMED]) + (f"; and {more} more" if more > 0 else "")


class Heart:
    """Sends a worker's pulse to the board from a thread of its own, for as long as the block runs.

    Args:
        timeout: seconds after which standing still is an end; 0: never.

    Attributes:
        told: on worker 0, whether the run is to stop.
    """

    def __init__(self, board: Board, rank: int, timeout: float):
        self._board = board
        self._rank = rank
        self.told = False
        self._seconds = LISTENING if rank == 0 else min(LONGEST, max(SHORTEST, timeout / 10)) if timeout else LONGEST
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)

    def __enter__(self) -> Heart:
        import ray

        self._address = ray.util.get_node_ip_address()
        whereabouts.begin()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        whereabouts.at(DONE)
        self._ended.set()
        self._thread.join(SHORTEST)

    def _beat(self) -> None:
        import ray

        try:
            ended = False
            while not ended:
                ended = self._ended.wait(self._seconds)
                place = whereabouts.here()
                seconds = time.monotonic() - place.since
                answer = self._board.beat(Pulse(self._rank, self._address, os.getpid(), place, seconds))
                if self._rank == 0:
                    self.told = ray.get(answer)
        except ray.exceptions.RayError:
            return  # the driver is gone, and its board with it
