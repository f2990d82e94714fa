"""Runs whose workers come and go with the cluster: `--num_workers MIN-MAX`.

Ray Train's own elastic policy takes whatever the cluster has, the CPUs that read too, and restarts workers at any step.
Here a run grows only behind a checkpoint, and only into what its reading leaves, by the restart that follows a lost
worker: the next start continues from the newest checkpoint, with the number of workers that fits then. Global batch and
order do not depend on that number.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raybge.cluster.resources import grown, look, reading_cpus
from raybge.training.checkpoint.manifest import newest

if TYPE_CHECKING:
    from raybge.cluster.resources import Plan
    from raybge.training.health.run_state import Board
    from raybge.training.worker_config import WorkerConfig

LOOK_SECONDS = 2.0
# A machine that is lost seems to be there until Ray's health checks have missed it.
LOST_SECONDS = 20.0


def within(plan: Plan, lanes: int, say: Callable[[str], None]) -> Plan:
    """The plan of an elastic run with no more workers than an order has lanes to give them."""
    if plan.range is None or not plan.range[0] <= lanes < plan.range[1]:
        return plan
    say(f"--num_workers: at most {lanes} workers can share the global batch, so MAX is {lanes}")
    return replace(plan, workers=min(plan.workers, lanes), range=(plan.range[0], lanes))


@dataclass
class Elastic:
    """What the driver of an elastic run knows of its cluster.

    Args:
        low, high: the fewest workers that train, and the most.
        storage: where checkpoints lie, a folder or a URI.
        runs: how many runs share the cluster.
    """

    low: int
    high: int
    storage: str
    runs: int = 1
    looked: float = 0.0
    since: int | None = None  # the newest checkpoint's update when there was first room for more workers
    target: int | None = None  # the number that the workers were ended for

    def begin(self) -> None:
        """Workers start."""
        self.since = self.target = None

    def watch(self, plan: Plan, board: Board) -> None:
        """Called now and then while workers train: end them behind a checkpoint where the next start can have more.

        The steps since that checkpoint, those of seconds, are trained again.
        """
        import ray

        if self.target or time.monotonic() < self.looked + LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        with contextlib.suppress(ray.exceptions.RayError):  # the run ended and took Ray with it
            self._grow(plan, board)

    def _grow(self, plan: Plan, board: Board) -> None:
        most = min(self._fitting(plan), plan.workers + _free(plan))
        if most <= plan.workers:
            self.since = None
            return
        start = newest(self.storage)
        update = start.step if start else 0
        if self.since is None:
            self.since = update
        elif self.since < update < board.read().total:
            self.target = most
            board.end()

    def settled(
        self, plan: Plan, lost: bool, say: Callable[[str], None], heed: Callable[[], None] = lambda: None
    ) -> int | None:
        """How many workers the next start has, after one ended before its time; None where the cluster is as it was and
        it is the workers that failed. Waits while fewer than MIN fit.

        `lost`: the failure may be that of a machine, which is then not missed at once. `heed` is called while it waits.
        """
        limit = time.monotonic() + LOST_SECONDS * (lost and not look().own)
        while (fits := self._fitting(plan)) >= plan.workers:
            if self.target or time.monotonic() >= limit:
                return min(fits, self.target) if self.target else None
            heed()
            time.sleep(LOOK_SECONDS / 4)
        if fits < self.low:
            missing = replace(plan, workers=self.low - fits, range=None).describe("worker")
            say(f"{look().describe()}: waiting for {missing} more, at least {self.low} train")
        while (fits := self._fitting(plan)) < self.low:
            grown(look(), str(self.low), plan.gpus > 0, plan.cpus, lambda _: None, self.runs)
            heed()
            time.sleep(LOOK_SECONDS)
        return fits

    def resized(self, config: WorkerConfig, plan: Plan, workers: int) -> tuple[WorkerConfig, Plan]:
        """What another number of workers is told: its shares of the same global batch, and of the reading."""
        plan = replace(plan, workers=workers)
        share = -(-config.order.global_batch // workers)
        training = {**config.training, "per_device_train_batch_size": share}
        return replace(config, training=training, reading_cpus=reading_cpus(look(), plan, self.runs)), plan

    def _fitting(self, plan: Plan) -> int:
        return min(self.high, look().fitting(plan.cpus, plan.gpus > 0) // self.runs)


def _free(plan: Plan) -> int:
    """Workers beside those of the plan that nobody else's work is in the way of."""
    import ray

    free = ray.available_resources()
    more = int(free.get("CPU", 0) // plan.cpus)
    return min(more, int(free.get("GPU", 0) // plan.gpus)) if plan.gpus else more
