"""Shared state of a training run: workers write their progress, the driver reads it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from raybge.training.health.heartbeat import HeartbeatRecord, describe_stall
from raybge.util.activity import Activity


@dataclass
class Progress:
    """Progress of a training run.

    Args:
        total: updates of the whole run; 0 until the workers have started.
        step: updates done.
        started_at: update at which the current workers started; None until they have.
        stopped_at: update after which the workers stopped on request; None if they did not.
        loss: mean loss since the previous report; None before the first report.
        evaluations: (step, metrics) of each evaluation.
        evaluation_seconds: duration of the last evaluation; 0 before.
        activity: activity of worker 0 in its last heartbeat; None before the first.
        messages: lines to show on the console.
        metrics: final metrics of the Trainer; empty until the run has finished.
    """

    total: int = 0
    step: int = 0
    started_at: int | None = None
    stopped_at: int | None = None
    loss: float | None = None
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    evaluation_seconds: float = 0.0
    activity: Activity | None = None
    messages: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)


class RunStateLostError(RuntimeError):
    """The process of the run state, or of a worker, cannot be reached: the run has ended."""


class WorkerHandle(Protocol):
    """Serializable handle to a worker."""

    def kill(self) -> None:
        """Kill the worker at once."""


class StateServer(Protocol):
    """Serializable connection to the process that holds a `RunStateStore`."""

    def send(self, method: str, *values: Any, **named: Any) -> None:
        """Call a method of the store and return at once."""

    def call(self, method: str, *values: Any, **named: Any) -> Any:
        """Call a method of the store and return its result. Raises RunStateLostError if the process is gone."""


class RunStateStore:
    """State behind `RunState`, in one process that driver and workers reach through a `StateServer`."""

    def __init__(self) -> None:
        self._progress = Progress()
        self._workers: list[WorkerHandle] = []
        self._stop_requested = False
        self._heartbeats: dict[int, tuple[HeartbeatRecord, float]] = {}  # by rank, with the time of arrival

    def update(self, **values: Any) -> None:
        """Set fields of the progress."""
        for name, value in values.items():
            setattr(self._progress, name, value)

    def add_evaluation(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Add the metrics of an evaluation, and its duration."""
        self._progress.evaluations.append((step, metrics))
        self._progress.evaluation_seconds = seconds

    def add_message(self, line: str) -> None:
        """Add a line for the console, once for all workers that report it."""
        if line not in self._progress.messages:
            self._progress.messages.append(line)

    def add_worker(self, worker: WorkerHandle) -> None:
        """Add a worker."""
        self._workers.append(worker)

    def workers(self) -> list[WorkerHandle]:
        """Return the workers."""
        return self._workers

    def add_heartbeat(self, heartbeat: HeartbeatRecord) -> bool:
        """Record a heartbeat; return whether the run is to stop."""
        self._heartbeats[heartbeat.rank] = heartbeat, time.monotonic()
        if heartbeat.rank == 0:
            self._progress.activity = heartbeat.activity
        return self._stop_requested

    def request_stop(self) -> None:
        """Request a graceful stop."""
        self._stop_requested = True

    def describe_stall(self, timeout: float) -> str | None:
        """Describe the stalled workers."""
        now = time.monotonic()
        received = self._heartbeats.values()
        return describe_stall([replace(heartbeat, age=now - at) for heartbeat, at in received], timeout)

    def clear_workers(self) -> None:
        """Forget the workers of an attempt."""
        self._workers, self._heartbeats = [], {}
        self._progress.started_at = self._progress.activity = None

    def read(self) -> Progress:
        """Return the progress."""
        return self._progress


class RunState:
    """Serializable handle to the run state. Writing does not wait unless stated.

    Args:
        server: connection to the process with the state.
    """

    def __init__(self, server: StateServer) -> None:
        self._server = server

    # --- called by the workers ---

    def register_worker(self, worker: WorkerHandle) -> None:
        """Register a worker, so that the driver can kill it."""
        self._server.send("add_worker", worker)

    def add_heartbeat(self, heartbeat: HeartbeatRecord) -> None:
        """Record a heartbeat."""
        self._server.send("add_heartbeat", heartbeat)

    def exchange_heartbeat(self, heartbeat: HeartbeatRecord) -> bool:
        """Record a heartbeat and return whether the run is to stop. Waits."""
        return bool(self._server.call("add_heartbeat", heartbeat))

    def set_started(self, total: int, step: int) -> None:
        """Report that the workers start, or resume after `step`, a run of `total` updates."""
        self._server.send("update", total=total, step=step, started_at=step)

    def set_progress(self, step: int, loss: float) -> None:
        """Report the updates done and the mean loss since the previous report."""
        self._server.send("update", step=step, loss=loss)

    def add_evaluation(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Report the metrics of an evaluation after update `step`, which took `seconds`."""
        self._server.send("add_evaluation", step, metrics, seconds)

    def add_message(self, line: str) -> None:
        """Show a line on the driver's console."""
        self._server.send("add_message", line)

    def set_stopped(self, step: int) -> None:
        """Report that the workers stopped after update `step`. Waits: the worker exits right afterwards."""
        self._server.call("update", step=step, stopped_at=step)

    def set_finished(self, metrics: dict[str, Any]) -> None:
        """Report the metrics of the finished run. Waits: the worker exits right afterwards."""
        self._server.call("update", metrics=metrics)

    # --- called by the driver; each waits and raises RunStateLostError if the run has ended ---

    def read(self) -> Progress:
        """Return the progress of the run."""
        progress: Progress = self._server.call("read")
        return progress

    def kill_workers(self) -> None:
        """Kill the registered workers."""
        workers: list[WorkerHandle] = self._server.call("workers")
        for worker in workers:
            worker.kill()

    def request_stop(self) -> None:
        """Request a graceful stop of the workers. Does not wait."""
        self._server.send("request_stop")

    def describe_stall(self, timeout: float) -> str | None:
        """Describe the workers that have stalled for more than `timeout` seconds; see `heartbeat.describe_stall`."""
        message: str | None = self._server.call("describe_stall", timeout)
        return message

    def clear_workers(self) -> None:
        """Forget the registered workers and their heartbeats, after they have ended."""
        self._server.call("clear_workers")
