"""Shared state of a training run: workers write their progress, the driver reads it. One small Ray actor."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from raybge.training.health.heartbeat import HeartbeatRecord, describe_stall


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
        messages: lines to show on the console.
        metrics: final metrics of the Trainer; empty until the run has finished.
    """

    total: int = 0
    step: int = 0
    started_at: int | None = None
    stopped_at: int | None = None
    loss: float | None = None
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


class _RunStateActor:
    """State of the actor behind `RunState`."""

    def __init__(self) -> None:
        self._progress = Progress()
        self._workers: list[Any] = []
        self._stop_requested = False
        self._heartbeats: dict[int, tuple[HeartbeatRecord, float]] = {}  # by rank, with the time of arrival

    def update(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self._progress, name, value)

    def add_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._progress.evaluations.append((step, metrics))

    def add_message(self, line: str) -> None:
        self._progress.messages.append(line)

    def add_worker(self, worker: Any) -> None:
        self._workers.append(worker)

    def workers(self) -> list[Any]:
        return self._workers

    def add_heartbeat(self, heartbeat: HeartbeatRecord) -> bool:
        self._heartbeats[heartbeat.rank] = heartbeat, time.monotonic()
        return self._stop_requested

    def request_stop(self) -> None:
        self._stop_requested = True

    def describe_stall(self, timeout: float) -> str | None:
        now = time.monotonic()
        received = self._heartbeats.values()
        return describe_stall([replace(heartbeat, age=now - at) for heartbeat, at in received], timeout)

    def clear_workers(self) -> None:
        self._workers, self._heartbeats, self._progress.started_at = [], {}, None

    def read(self) -> Progress:
        return self._progress


class RunState:
    """Serializable handle to the run state actor. Writing does not wait unless stated."""

    def __init__(self) -> None:
        import ray

        # Pinned to the driver's node, and not softly, which lets Ray place it elsewhere at times: on a worker's node
        # the actor would be lost with that node, and the whole run with it.
        driver_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._actor = ray.remote(_RunStateActor).options(num_cpus=0, scheduling_strategy=driver_node).remote()

    # --- called by the workers ---

    def register_worker(self) -> None:
        """Register the current worker, so that the driver can kill it."""
        import ray

        self._actor.add_worker.remote(ray.get_runtime_context().current_actor)

    def add_heartbeat(self, heartbeat: HeartbeatRecord) -> Any:
        """Record a heartbeat. Return a Ray reference to a bool: whether the run is to stop."""
        return self._actor.add_heartbeat.remote(heartbeat)

    def set_started(self, total: int, step: int) -> None:
        """Report that the workers start, or resume after `step`, a run of `total` updates."""
        self._actor.update.remote(total=total, step=step, started_at=step)

    def set_progress(self, step: int, loss: float) -> None:
        """Report the updates done and the mean loss since the previous report."""
        self._actor.update.remote(step=step, loss=loss)

    def add_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Report the metrics of an evaluation after update `step`."""
        self._actor.add_evaluation.remote(step, metrics)

    def add_message(self, line: str) -> None:
        """Show a line on the driver's console."""
        self._actor.add_message.remote(line)

    def set_stopped(self, step: int) -> None:
        """Report that the workers stopped after update `step`. Waits: the worker exits right afterwards."""
        import ray

        ray.get(self._actor.update.remote(step=step, stopped_at=step))

    def set_finished(self, metrics: dict[str, float]) -> None:
        """Report the metrics of the finished run. Waits: the worker exits right afterwards."""
        import ray

        ray.get(self._actor.update.remote(metrics=metrics))

    # --- called by the driver ---

    def read(self) -> Progress:
        """Return the progress of the run."""
        import ray

        return ray.get(self._actor.read.remote())

    def workers(self) -> list[Any]:
        """Return the registered worker actors."""
        import ray

        return ray.get(self._actor.workers.remote())

    def kill_workers(self) -> None:
        """Kill the registered workers, whichever node they are on."""
        import ray

        for worker in self.workers():
            ray.kill(worker)

    def request_stop(self) -> None:
        """Request a graceful stop of the workers."""
        self._actor.request_stop.remote()

    def describe_stall(self, timeout: float) -> str | None:
        """Describe the workers that have stalled for more than `timeout` seconds; see `heartbeat.describe_stall`."""
        import ray

        return ray.get(self._actor.describe_stall.remote(timeout))

    def clear_workers(self) -> None:
        """Forget the registered workers and their heartbeats, after they have ended."""
        import ray

        ray.get(self._actor.clear_workers.remote())
