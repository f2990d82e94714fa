"""Where workers write how far they are and the driver reads it: one small Ray actor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """How far a training run is. `loss` is the mean since the last word, `metrics` are the Trainer's final ones."""

    total: int = 0
    step: int = 0
    loss: float = float("nan")
    metrics: dict[str, float] = field(default_factory=dict)


class _Keeper:
    """The actor's state."""

    def __init__(self) -> None:
        self.progress = Progress()

    def update(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self.progress, name, value)

    def read(self) -> Progress:
        return self.progress


class Board:
    """A handle that travels to workers; writing does not wait."""

    def __init__(self) -> None:
        import ray

        # With the driver: a board that dies with a worker's machine would take the run's screen with it.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        self._keeper = ray.remote(_Keeper).options(num_cpus=0, scheduling_strategy=here).remote()

    def begin(self, total: int) -> None:
        self._keeper.update.remote(total=total)

    def tell(self, step: int, loss: float) -> None:
        self._keeper.update.remote(step=step, loss=loss)

    def finish(self, metrics: dict[str, float]) -> None:
        """Say the run's metrics, and wait until they are said: the worker ends right after."""
        import ray

        ray.get(self._keeper.update.remote(metrics=metrics))

    def read(self) -> Progress:
        import ray

        return ray.get(self._keeper.read.remote())
