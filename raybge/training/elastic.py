"""Elastic training runs (`--num_workers MIN-MAX`): the number of workers follows the size of the cluster.

Ray Train's own elastic policy takes all of the cluster, including the CPUs that read data, and restarts workers at any
step. Here a run grows only right after a checkpoint, and only into resources that its reading leaves free, through the
same restart that follows a lost worker: the next attempt resumes from the latest checkpoint with as many workers as fit
then. Global batch and order of the rows do not depend on that number.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raybge.cluster.autoscaling import wait_for_capacity
from raybge.cluster.connection import current_cluster
from raybge.cluster.resources import reading_cpus
from raybge.training.checkpoint.manifest import latest_checkpoint
from raybge.training.health.run_state import RunStateLostError

if TYPE_CHECKING:
    from raybge.cluster.resources import Plan
    from raybge.training.health.run_state import RunState

CHECK_SECONDS = 2.0
# Ray reports a lost node as alive until its health checks have failed.
NODE_LOSS_SECONDS = 20.0


def limit_to_lanes(plan: Plan, lanes: int, log: Callable[[str], None]) -> Plan:
    """Limit the workers of an elastic run to the lanes of its order: a worker without a lane has nothing to do.

    Args:
        plan: plan of the run; returned unchanged if the run is not elastic, or if even MIN exceeds the lanes (the order
            refuses that later).
        lanes: lanes of the run's order.
        log: called with a line for the user if MAX is lowered.

    Returns:
        The plan with the limit.
    """
    if plan.range is None or not plan.range[0] <= lanes < plan.range[1]:
        return plan
    log(f"--num_workers: at most {lanes} workers can share the global batch, so MAX is {lanes}")
    return replace(plan, workers=min(plan.workers, lanes), range=(plan.range[0], lanes))


@dataclass
class ElasticPolicy:
    """Policy of an elastic run: the number of its workers, and when it restarts to change it.

    Args:
        low: fewest workers that train.
        high: most workers that train.
        storage: folder or URI of the checkpoints.
        runs: number of runs that share the cluster.
    """

    low: int
    high: int
    storage: str
    runs: int = 1
    last_check: float = 0.0
    room_since: int | None = None  # update of the latest checkpoint when the cluster first had room for more workers
    target: int | None = None  # worker count for which the workers were killed

    def start_attempt(self) -> None:
        """Reset for workers that are about to start."""
        self.room_since = self.target = None

    def check_growth(self, plan: Plan, run_state: RunState) -> None:
        """Kill the workers right after a checkpoint if the next attempt can have more. Call regularly during training.

        The steps since that checkpoint, a few seconds' worth, are repeated.
        """
        import ray

        if self.target or time.monotonic() < self.last_check + CHECK_SECONDS:
            return
        self.last_check = time.monotonic()
        with contextlib.suppress(ray.exceptions.RayError, RunStateLostError):  # Ray was shut down with the run
            self._grow(plan, run_state)

    def _grow(self, plan: Plan, run_state: RunState) -> None:
        workers = min(self._max_workers(plan), plan.workers + _free_workers(plan))
        if workers <= plan.workers:
            self.room_since = None
            return
        checkpoint = latest_checkpoint(self.storage)
        update = checkpoint.step if checkpoint else 0
        if self.room_since is None:
            self.room_since = update
        elif self.room_since < update < run_state.read().total:
            self.target = workers
            run_state.kill_workers()

    def workers_after_failure(
        self,
        plan: Plan,
        node_may_be_lost: bool,
        log: Callable[[str], None],
        raise_if_signaled: Callable[[], None] = lambda: None,
    ) -> int | None:
        """Return the worker count for the next attempt. Waits while fewer than MIN workers fit.

        Args:
            plan: plan of the attempt that ended.
            node_may_be_lost: the failure may be that of a node, which Ray reports with a delay.
            log: called with a line for the user before waiting.
            raise_if_signaled: called while waiting; raises if the run is to end.

        Returns:
            The worker count if the cluster changed, or None if it did not and the workers themselves failed.
        """
        deadline = time.monotonic() + NODE_LOSS_SECONDS * (node_may_be_lost and not current_cluster().own)
        while (workers := self._max_workers(plan)) >= plan.workers:
            if self.target or time.monotonic() >= deadline:
                return min(workers, self.target) if self.target else None
            raise_if_signaled()
            time.sleep(CHECK_SECONDS / 4)
        if workers < self.low:
            missing = replace(plan, workers=self.low - workers, range=None).describe("worker")
            log(f"{current_cluster().describe()}: waiting for {missing} more; at least {self.low} are required")
        while (workers := self._max_workers(plan)) < self.low:
            wait_for_capacity(current_cluster(), str(self.low), plan.gpus > 0, plan.cpus, lambda _: None, self.runs)
            raise_if_signaled()
            time.sleep(CHECK_SECONDS)
        return workers

    def resize(self, plan: Plan, workers: int) -> tuple[Plan, float]:
        """Return the plan with another number of workers, and the CPUs of each one's reading."""
        plan = replace(plan, workers=workers)
        return plan, reading_cpus(current_cluster(), plan, self.runs)

    def _max_workers(self, plan: Plan) -> int:
        """Return how many workers of the plan fit into this run's share of the cluster, at most MAX."""
        return min(self.high, current_cluster().max_workers(plan.cpus, plan.gpus > 0) // self.runs)


def _free_workers(plan: Plan) -> int:
    """Return how many more workers of the plan fit into resources that nothing uses."""
    import ray

    free = ray.available_resources()
    workers = int(free.get("CPU", 0) // plan.cpus)
    return min(workers, int(free.get("GPU", 0) // plan.gpus)) if plan.gpus else workers
