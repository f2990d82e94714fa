"""Where workers write how far they are and the driver reads it: one small Ray actor."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from raybge.training.health.heartbeat import Pulse, stalled


@dataclass
class Progress:
    """How far a training run is.

    `loss` is the mean since the last word, None before the first, `measured` the step and metrics of each evaluation,
    `said` lines for the person, `metrics` are the Trainer's final ones. `begun` is the step at which the present
    workers began, `stopped` the one after which they ended because they were told to.
    """

    total: int = 0
    step: int = 0
    begun: int | None = None
    stopped: int | None = None
    loss: float | None = None
    measured: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


class _Keeper:
    """The actor's state."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.present: list[Any] = []
        self.stopping = False
        self.pulses: dict[int, tuple[Pulse, float]] = {}  # by rank, with the time it came

    def update(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self.progress, name, value)

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        self.progress.measured.append((step, metrics))

    def say(self, line: str) -> None:
        self.progress.said.append(line)

    def join(self, worker: Any) -> None:
        self.present.append(worker)

    def workers(self) -> list[Any]:
        return self.present

    def beat(self, pulse: Pulse) -> bool:
        self.pulses[pulse.rank] = pulse, time.monotonic()
        return self.stopping

    def stop(self) -> None:
        self.stopping = True

    def stalled(self, timeout: float) -> str | None:
        now = time.monotonic()
        return stalled([replace(pulse, heard=now - came) for pulse, came in self.pulses.values()], timeout)

    def clear(self) -> None:
        self.present, self.pulses, self.progress.begun = [], {}, None

    def read(self) -> Progress:
        return self.progress


class Board:
    """A handle that travels to workers; writing does not wait."""

    def __init__(self) -> None:
        import ray

        # With the driver, and not soft, which lets Ray put it elsewhere at times: a board that dies with a worker's
        # machine would take the whole run with it.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._keeper = ray.remote(_Keeper).options(num_cpus=0, scheduling_strategy=here).remote()

    def join(self) -> None:
        """Called in each worker: whoever reads the board can then end it."""
        import ray

        self._keeper.join.remote(ray.get_runtime_context().current_actor)

    def workers(self) -> list[Any]:
        """The actors that joined."""
        import ray

        return ray.get(self._keeper.workers.remote())

    def end(self) -> None:
        """End the workers that joined, wherever they are."""
        import ray

        for worker in self.workers():
            ray.kill(worker)

    def beat(self, pulse: Pulse) -> Any:
        """What a worker is doing. A reference to whether it is to stop."""
        return self._keeper.beat.remote(pulse)

    def stop(self) -> None:
        """Tell the workers to stop."""
        self._keeper.stop.remote()

    def stopped(self, step: int) -> None:
        """The workers have stopped after this step. Waits until it is said: the worker ends right after."""
        import ray

        ray.get(self._keeper.update.remote(step=step, stopped=step))

    def stalled(self, timeout: float) -> str | None:
        """Who keeps the workers waiting for more than `timeout` seconds; see `heartbeat.stalled`."""
        import ray

        return ray.get(self._keeper.stalled.remote(timeout))

    def clear(self) -> None:
        """Forget the workers: they have ended."""
        import ray

        ray.get(self._keeper.clear.remote())

    def begin(self, total: int, step: int) -> None:
        """A run of `total` updates starts, or continues after `step` of them."""
        self._keeper.update.remote(total=total, step=step, begun=step)

    def tell(self, step: int, loss: float) -> None:
        self._keeper.update.remote(step=step, loss=loss)

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        self._keeper.measured.remote(step, metrics)

    def say(self, line: str) -> None:
        """Show the person a line."""
        self._keeper.say.remote(line)

    def finish(self, metrics: dict[str, float]) -> None:
        """Say the run's metrics, and wait until they are said: the worker ends right after."""
        import ray

        ray.get(self._keeper.update.remote(metrics=metrics))

    def read(self) -> Progress:
        import ray

        return ray.get(self._keeper.read.remote())
