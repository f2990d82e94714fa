"""Resources of a cluster, and plans of workers that never request more than it has.

Workers and the tasks that read rows for them use the same CPUs. If workers take all of them, reading waits forever and
nothing reports it. So a Ray that raybge starts itself has extra CPU slots that only reading uses, and on a cluster that
it joins a plan has to leave at least one CPU free; otherwise the command stops and says what is missing.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from raybge.util.errors import UserError
from raybge.util.plural import plural

# Most cores of one CPU worker by default: intra-operator threads gain little beyond.
CORES_A_WORKER = 8
# CPUs of the reading for each GPU, where the nodes have them: one CPU tokenizes 0.3 million tokens a second, which is a
# quarter of what one of today's GPUs encodes.
READING_CPUS_A_GPU = 3


@dataclass(frozen=True)
class Cluster:
    """CPUs, GPUs and memory of a Ray cluster.

    Args:
        own: raybge started this Ray, with extra CPU slots for reading.
        cpus: CPUs of all nodes, without the extra slots.
        gpus: GPUs of all nodes.
        nodes: number of nodes.
        node_cpus: CPUs of each node.
        node_gpus: GPUs of each node.
        memory: bytes that Ray counts for tasks and actors on all nodes, without its object store.
    """

    own: bool
    cpus: int
    gpus: int
    nodes: int
    node_cpus: tuple[int, ...]
    node_gpus: tuple[int, ...]
    memory: int = 0

    def max_workers(self, cpus: int, gpu: bool) -> int:
        """Return how many workers fit the nodes while CPUs for reading stay free.

        Args:
            cpus: CPUs of each worker.
            gpu: each worker has a GPU.

        Returns:
            The number of workers.
        """
        fit = (min(c // cpus, g) if gpu else c // cpus for c, g in zip(self.node_cpus, self.node_gpus, strict=True))
        return min(sum(fit), self.worker_cpus // cpus)

    @property
    def worker_cpus(self) -> int:
        """CPUs that workers may take in total; the rest is for reading."""
        return self.cpus if self.own else self.cpus - 1

    def describe(self) -> str:
        """Return the cluster in a few words, for messages."""
        gpus = f", {plural(self.gpus, 'GPU')}" if self.gpus else ", no GPU"
        place = "this machine" if self.own else f"Ray cluster of {plural(self.nodes, 'node')}"
        return f"{place}, {plural(self.cpus, 'CPU')}{gpus}"


@dataclass(frozen=True)
class Plan:
    """Number of workers (or actors) and the resources of each.

    Args:
        workers: number of workers.
        cpus: CPUs of each.
        gpus: GPUs of each, 0 or 1.
        range: fewest and most workers of an elastic run; None for a fixed number.
    """

    workers: int
    cpus: int
    gpus: int
    range: tuple[int, int] | None = None

    def describe(self, noun: str) -> str:
        """Return the plan in a few words; `noun` is the singular of what runs, such as "worker"."""
        has = plural(self.cpus, "CPU") + (f" and {self.gpus} GPU" if self.gpus else "")
        if self.range:
            return f"{self.range[0]} to {self.range[1]} {noun}s of {has}, {self.workers} now"
        return f"{plural(self.workers, noun)} of {has}"


def plan_workers(
    cluster: Cluster,
    num_workers: str | None,
    use_gpu: bool | None,
    cpus_per_worker: int | None,
    *,
    cores_a_worker: int = CORES_A_WORKER,
    elastic: bool = False,
) -> Plan:
    """Plan the workers of a run and check that the cluster holds them.

    Args:
        cluster: the connected cluster.
        num_workers: "N", or "MIN-MAX" for an elastic run, whose plan has as many as fit now; default: one worker per
            GPU, or without a GPU as many as the cores carry.
        use_gpu: one GPU per worker; default: if the cluster has GPUs.
        cpus_per_worker: CPUs of each worker; default: an even share of the cores, of which each GPU's reading has
            `READING_CPUS_A_GPU`.
        cores_a_worker: most cores of a CPU worker if `cpus_per_worker` is unset.
        elastic: accept "MIN-MAX".

    Returns:
        A plan that leaves CPUs for reading.

    Raises:
        UserError: the cluster cannot hold the workers; the message names the flag and what would fit.
    """
    gpu = cluster.gpus > 0 if use_gpu is None else use_gpu
    if gpu and not cluster.gpus:
        raise UserError(f"--use_gpu: {cluster.describe()}")
    low, high = parse_num_workers(num_workers, elastic) or (None, None)
    if cpus_per_worker is not None and cpus_per_worker < 1:
        raise UserError(f"--cpus_per_worker must be at least 1, found {cpus_per_worker}")
    if cluster.worker_cpus < 1:
        raise UserError(f"{cluster.describe()}: a worker and its reading need at least 2 CPUs")
    fit = cluster.max_workers(cpus_per_worker or 1, gpu)
    requested = high if low == high else max(low or 1, min(high or 1, fit))
    if gpu:
        workers = requested or cluster.gpus
        most = min(CORES_A_WORKER, max(1, cluster.cpus // workers - READING_CPUS_A_GPU))
    else:
        workers = requested or 1
        most = min(cores_a_worker, max(1, cluster.worker_cpus // workers), max(cluster.node_cpus))
    if gpu and workers > cluster.gpus:
        raise UserError(f"--num_workers {workers}: the cluster has only {cluster.gpus} GPUs ({cluster.describe()})")
    # The largest share of the cores with which all workers still find a node.
    shares = (cpus for cpus in range(most, 1, -1) if cluster.max_workers(cpus, gpu) >= workers)
    cpus = cpus_per_worker or next(shares, 1)
    if not gpu and not requested:
        workers = max(1, cluster.max_workers(cpus, gpu))
    plan = Plan(workers, cpus, int(gpu))
    _check_fits(cluster, plan)
    return replace(plan, range=(low, high)) if low and high and low < high else plan


def _check_fits(cluster: Cluster, plan: Plan) -> None:
    fit = cluster.max_workers(plan.cpus, plan.gpus > 0)
    if plan.workers > fit:
        reading = "" if cluster.own else " and leave 1 CPU for reading"
        raise UserError(
            f"{plan.describe('worker')} do not fit {cluster.describe()}{reading}: at most --num_workers {fit}"
            + (f" with --cpus_per_worker {plan.cpus}" if fit else ", or a lower --cpus_per_worker")
        )


def parse_num_workers(num_workers: str | None, elastic: bool) -> tuple[int, int] | None:
    """Parse `--num_workers` into the fewest and the most workers; None if it is unset.

    Raises UserError if it is neither a whole number of at least 1 nor MIN-MAX, or it is MIN-MAX and not `elastic`.
    """
    if num_workers is None:
        return None
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", num_workers, re.ASCII)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UserError(f"--num_workers must be a whole number of at least 1, or MIN-MAX, found «{num_workers}»")
    if low < high and not elastic:
        raise UserError(
            f"--num_workers {num_workers}: only raybge.train and raybge.pretrain accept MIN-MAX; give one number"
        )
    return low, high


def read_cluster(own: bool) -> Cluster:
    """Read the resources of the Ray cluster that this process is connected to.

    Args:
        own: raybge started it; its CPU slots for reading are not counted.

    Returns:
        The cluster's resources.
    """
    import ray

    alive = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    node_cpus = tuple(int(r.get("CPU", 0)) - (reading_slots() if own else 0) for r in alive)
    node_gpus = tuple(int(r.get("GPU", 0)) for r in alive)
    memory = int(sum(r.get("memory", 0) for r in alive))
    return Cluster(own, sum(node_cpus), sum(node_gpus), len(alive), node_cpus, node_gpus, memory)


def head_address() -> str:
    """Return the address of the cluster's head node."""
    import ray

    return str(next(n["NodeManagerAddress"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]))


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reading_slots() -> int:
    """Return the extra CPU slots for reading in a Ray that raybge starts."""
    return max(2, available_cores() // 4)


def concurrent_runs(cluster: Cluster, plan: Plan) -> int:
    """Return how many runs of a plan the cluster holds at a time, each with a CPU for its reading."""
    cpus = cluster.cpus + (reading_slots() if cluster.own else 0)
    fit = min(
        cluster.max_workers(plan.cpus, plan.gpus > 0) // plan.workers,
        cpus // (plan.workers * plan.cpus + 1),
    )
    return max(1, fit)


def reading_cpus(cluster: Cluster, plan: Plan, runs: int = 1) -> float:
    """Return the CPUs for each worker's reading: an even share of what the workers of `runs` runs leave.

    A paused reading task keeps its CPU. If one worker's task could take another's share, the other would read nothing,
    and both would wait for each other in the next collective.
    """
    workers = plan.workers * runs
    free = cluster.cpus - workers * plan.cpus
    if cluster.own:  # the cores that its workers leave are no slots, except with GPUs, whose reading needs them
        free = reading_slots() + (free if plan.gpus else 0)
    return max(free / workers, 1e-3)
