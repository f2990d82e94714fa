"""Heartbeats of the training workers, and detection of workers that stall.

`Heartbeat` runs in each worker and sends what its training thread is doing; `describe_stall` runs where the heartbeats
of all workers are collected, and names the worker that the others wait for.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from raybge.util.activity import DONE, READING, STARTING, Activity, current_activity, reset_activity, set_activity

if TYPE_CHECKING:
    from raybge.training.health.run_state import RunState

MIN_SECONDS, MAX_SECONDS = 0.5, 10.0  # between two heartbeats: 512 workers at the maximum send 51 a second
RANK_0_SECONDS = 0.2  # worker 0 sends more often: the reply carries the request to stop
MAX_NAMED = 3  # workers named in one message


class WorkerStallError(RuntimeError):
    """A worker stalled and the others would wait for it in their collectives."""


@dataclass(frozen=True)
class HeartbeatRecord:
    """One heartbeat as it was received.

    Args:
        rank: rank of the worker.
        address: IP address of its node.
        pid: its process.
        activity: its activity when the heartbeat was sent.
        seconds: how long the activity had lasted by then.
        age: seconds since the heartbeat was received.
    """

    rank: int
    address: str
    pid: int
    activity: Activity
    seconds: float
    age: float = 0.0

    @property
    def unchanged_seconds(self) -> float:
        """Return the seconds since the last known change of activity."""
        return self.seconds + self.age

    def __str__(self) -> str:
        """Return the worker's name for messages."""
        return f"worker {self.rank} ({self.address}, pid {self.pid})"


def describe_stall(heartbeats: Sequence[HeartbeatRecord], timeout: float) -> str | None:
    """Describe which worker has kept the others waiting for more than `timeout` seconds.

    While any worker is starting and its heartbeats arrive, no worker counts as stalled: starting may be slow, and the
    others wait for it.

    Args:
        heartbeats: the last heartbeat of each worker.
        timeout: seconds without progress after which a worker counts as stalled.

    Returns:
        A message that names the stalled workers, or None if there are none.
    """
    if any(beat.activity.name == STARTING and beat.age <= timeout for beat in heartbeats):
        return None
    running = [beat for beat in heartbeats if beat.activity.name != DONE]
    silent = [beat for beat in running if beat.age > timeout]
    unchanged = [beat for beat in running if beat.unchanged_seconds > timeout]
    reading = [beat for beat in unchanged if beat.activity.name == READING and beat.age <= timeout]
    waiting = [beat for beat in unchanged if beat.activity.is_collective or beat.activity.has_collective]
    front = max((beat.activity.collectives for beat in waiting), default=0)
    behind = [
        beat for beat in unchanged if beat.activity.collectives < front and beat not in reading and beat.age <= timeout
    ]
    missing = [f"{beat} has sent no heartbeat for {beat.age:.0f} s" for beat in silent]
    missing += [f"{beat} has been in {beat.activity.name} for {beat.unchanged_seconds:.0f} s" for beat in behind]
    missing += [f"{beat} has been {READING} for {beat.unchanged_seconds:.0f} s" for beat in reading]
    if not missing and not any(beat.activity.is_collective for beat in waiting):
        return None
    message = _shorten(missing) if missing else f"all {len(running)} workers send heartbeats, but none makes progress"
    others = [beat for beat in waiting if beat.activity.collectives == front and beat.age <= timeout]
    return message + (f"; {len(others)} wait in {others[0].activity.name}" if others else "")


def _shorten(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return "; ".join(names[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")


class Heartbeat:
    """Context manager that sends a worker's heartbeats to the run state from a background thread.

    Args:
        run_state: receives the heartbeats.
        rank: rank of this worker.
        address: IP address of its node.
        timeout: stall timeout in seconds, which sets the interval; 0 if stalls are not detected.

    Attributes:
        stop_requested: whether the run is to stop; set on worker 0 only.
    """

    def __init__(self, run_state: RunState, rank: int, address: str, timeout: float):
        self.stop_requested = False
        self._run_state = run_state
        self._rank, self._address = rank, address
        self._interval = RANK_0_SECONDS if rank == 0 else _interval_for(timeout)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._send, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        """Start sending."""
        reset_activity()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send a last heartbeat with the activity DONE."""
        set_activity(DONE)
        self._closed.set()
        self._thread.join(MIN_SECONDS)

    def _send(self) -> None:
        from raybge.training.health.run_state import RunStateLostError

        try:
            closed = False
            while True:  # the first one at once: a worker that never sends any is not known to have stalled
                activity = current_activity()
                seconds = time.monotonic() - activity.started
                record = HeartbeatRecord(self._rank, self._address, os.getpid(), activity, seconds)
                if self._rank == 0:
                    self.stop_requested = self._run_state.exchange_heartbeat(record)
                else:
                    self._run_state.add_heartbeat(record)
                if closed:
                    return
                closed = self._closed.wait(self._interval)
        except RunStateLostError:
            return  # the driver has ended, and the run state with it


def _interval_for(timeout: float) -> float:
    """Return the seconds between two heartbeats: a tenth of the stall timeout within the limits."""
    return min(MAX_SECONDS, max(MIN_SECONDS, timeout / 10)) if timeout else MAX_SECONDS
