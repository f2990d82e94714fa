"""Wait until an autoscaling cluster has started the machines that a command requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raybge.cluster.resources import Cluster, parse_num_workers, read_cluster
from raybge.compat.ray import is_autoscaling, machines_are_starting
from raybge.util.errors import UserError

# Seconds until the first machine has to be starting, and for each one to join.
STARTING, STARTED = 60, 1200


def wait_for_capacity(
    cluster: Cluster,
    num_workers: str | None,
    use_gpu: bool | None,
    cpus_per_worker: int | None,
    say: Callable[[str], None],
    runs: int = 1,
    elastic: bool = False,
) -> Cluster:
    """Wait until an autoscaling cluster (`ray up`) fits `runs` times the requested workers, or stops growing.

    Args:
        cluster: the connected cluster, which may have no machine yet.
        num_workers: see `plan_workers`.
        use_gpu: see `plan_workers`.
        cpus_per_worker: see `plan_workers`.
        say: called with one line if machines are requested.
        runs: runs that need the workers at the same time.
        elastic: accept "MIN-MAX" as `num_workers`; MAX are requested.

    Returns:
        The grown cluster; any other cluster unchanged.

    Raises:
        UserError: the cluster has no machine and `num_workers` is unset.
    """
    requested = parse_num_workers(num_workers, elastic)
    if cluster.own or not is_autoscaling():
        return cluster
    gpu = cluster.gpus > 0 if use_gpu is None else use_gpu
    workers, cpus = requested and requested[1], max(1, cpus_per_worker or 1)
    if workers is None and cluster.worker_cpus < 1:
        raise UserError(
            "--num_workers: this cluster starts machines on request and has none yet; give the number of workers "
            "(and --use_gpu or --cpus_per_worker)"
        )
    workers = workers and workers * runs
    if workers is None or (fits := cluster.max_workers(cpus, gpu)) >= workers:
        return cluster
    say(f"cluster: {cluster.describe()}; room for {max(0, fits)} of {workers} workers, requesting more machines")
    bundle = {"CPU": cpus, "GPU": 1} if gpu else {"CPU": cpus}
    with _requested([bundle] * workers + [{"CPU": 1}] * runs):
        change = time.monotonic()
        while time.monotonic() < change + (STARTED if machines_are_starting() else STARTING):
            time.sleep(2)
            now = read_cluster(own=False)
            if now.max_workers(cpus, gpu) >= workers:
                return now
            if now.nodes != cluster.nodes:
                cluster, change = now, time.monotonic()
    return cluster


@contextmanager
def _requested(bundles: list[dict[str, int]]) -> Iterator[None]:
    """Request resources during the block only: a request that outlived its command would keep the machines."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)
    try:
        yield
    finally:
        request_resources(bundles=[])
