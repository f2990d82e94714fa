"""Connect to Ray and plan who does the work, without ever asking for more than there is.

Ray's workers and the tasks that read for them draw on the same CPUs. When workers take all of them, reading waits for
ever and nothing reports it. So a Ray that raybge starts itself has extra CPU slots that only reading uses, and on a
cluster that it joins a plan must leave at least one CPU free, or the command stops with what is missing.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raybge.util.errors import UserError

# Cores of one CPU worker when nothing is said: intra-operator threads gain little beyond.
CORES_A_WORKER = 8

# Seconds to wait for a cluster that starts machines: until the first one is under way, and for each to be there.
STARTING, STARTED = 60, 1200

# What lets Ray listen to other machines, as its name says on some systems alone.
OPEN = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# Whether the Ray that this process is connected to was started below, with slots for reading.
_own = False


@dataclass(frozen=True)
class Cluster:
    """What there is to work with. `cpus` leaves out the slots that are kept for reading when `own` is true."""

    own: bool
    cpus: int
    gpus: int
    nodes: int
    node_cpus: tuple[int, ...]
    node_gpus: tuple[int, ...]
    memory: int = 0  # bytes that Ray counts for tasks and actors of all nodes, beside its object store

    def fitting(self, cpus: int, gpu: bool) -> int:
        """Workers of `cpus` CPUs, and a GPU each with `gpu`, that the nodes hold beside the reading."""
        held = (min(c // cpus, g) if gpu else c // cpus for c, g in zip(self.node_cpus, self.node_gpus, strict=True))
        return min(sum(held), self.room // cpus)

    @property
    def room(self) -> int:
        """CPUs that workers may take in all; the rest reads."""
        return self.cpus if self.own else self.cpus - 1

    def describe(self) -> str:
        gpus = f", {self.gpus} GPU{'s' * (self.gpus != 1)}" if self.gpus else ", no GPU"
        place = "this machine" if self.own else f"Ray cluster of {self.nodes} node{'s' * (self.nodes != 1)}"
        return f"{place}, {self.cpus} CPUs{gpus}"


@dataclass(frozen=True)
class Plan:
    """How many workers (or actors) and what each holds. `range`: the fewest and the most, where they come and go."""

    workers: int
    cpus: int
    gpus: int
    range: tuple[int, int] | None = None

    def describe(self, noun: str) -> str:
        has = f"{self.cpus} CPU{'s' * (self.cpus != 1)}" + (f" and {self.gpus} GPU" if self.gpus else "")
        if self.range:
            return f"{self.range[0]} to {self.range[1]} {noun}s of {has}, {self.workers} now"
        return f"{self.workers} {noun}{'s' * (self.workers != 1)} of {has}"


@contextmanager
def connect(address: str | None = None, verbose: bool = False) -> Iterator[Cluster]:
    """Join the Ray cluster at `address`, RAY_ADDRESS or a live `ray start`; else start Ray here and stop it afterwards.

    Where this process is connected already, that connection is used and left as it is.
    """
    global _own
    target = address or os.environ.get("RAY_ADDRESS") or _live_head()
    if target in (None, "local"):
        # Ray reads this when it is imported: its ports stay on the loopback interface of a machine that is alone.
        os.environ.setdefault(OPEN, "0")
    import ray

    _quiet(verbose)
    if ray.is_initialized():
        yield _look(_own)
        return
    _own = target in (None, "local")
    _start() if _own else _join(str(target))
    try:
        yield _look(_own)
    finally:
        ray.shutdown()
        _own = False


def wait_for_capacity(
    cluster: Cluster,
    num_workers: str | None,
    use_gpu: bool | None,
    cpus_per_worker: int | None,
    say: Callable[[str], None],
    runs: int = 1,
    elastic: bool = False,
) -> Cluster:
    """The cluster once it holds what is asked for, so many times, or when no more of it comes: one that starts machines
    when asked (`ray up`) may begin with none. Any other is given back as it is.
    """
    asked = _count(num_workers, elastic)
    if cluster.own or not _starts_machines():
        return cluster
    gpu = cluster.gpus > 0 if use_gpu is None else use_gpu
    workers, cpus = asked and asked[1], max(1, cpus_per_worker or 1)
    if workers is None and cluster.room < 1:
        raise UserError(
            "--num_workers: this cluster starts its machines when asked, and none is up; say how many workers "
            "(and --use_gpu or --cpus_per_worker)"
        )
    workers = workers and workers * runs
    if workers is None or (fits := cluster.max_workers(cpus, gpu)) >= workers:
        return cluster
    say(f"cluster: {cluster.describe()}; room for {max(0, fits)} of {workers} workers, asking for more machines")
    bundle = {"CPU": cpus, "GPU": 1} if gpu else {"CPU": cpus}
    with _asked_for([bundle] * workers + [{"CPU": 1}] * runs):
        change = time.monotonic()
        while time.monotonic() < change + (STARTED if _machines_start() else STARTING):
            time.sleep(2)
            now = _look(own=False)
            if now.max_workers(cpus, gpu) >= workers:
                return now
            if now.nodes != cluster.nodes:
                cluster, change = now, time.monotonic()
    return cluster


def _starts_machines() -> bool:
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return is_autoscaler_v2()


def _machines_start() -> bool:
    """Whether a machine is on its way."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return bool(status.pending_nodes or status.pending_launches)


@contextmanager
def _asked_for(bundles: list[dict[str, int]]) -> Iterator[None]:
    """Ask the cluster to hold these, while the block runs: a wish that outlived its command would keep the machines."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)
    try:
        yield
    finally:
        request_resources(bundles=[])


def plan_workers(
    cluster: Cluster,
    num_workers: str | None,
    use_gpu: bool | None,
    cpus_per_worker: int | None,
    *,
    cores_a_worker: int = CORES_A_WORKER,
    elastic: bool = False,
) -> Plan:
    """One worker per GPU, or without one as many as the cores carry; what was asked for is checked against the cluster.

    With `elastic`, `num_workers` may be MIN-MAX: the plan has as many of them as fit.
    Raises UserError, naming the flag and what would fit, when the cluster cannot hold it and leave room for reading.
    """
    gpu = cluster.gpus > 0 if use_gpu is None else use_gpu
    if gpu and not cluster.gpus:
        raise UserError(f"--use_gpu: {cluster.describe()}")
    low, high = _count(num_workers, elastic) or (None, None)
    if cpus_per_worker is not None and cpus_per_worker < 1:
        raise UserError(f"--cpus_per_worker must be at least 1, found {cpus_per_worker}")
    if cluster.room < 1:
        raise UserError(f"{cluster.describe()}: a worker and the reading for it need at least 2 CPUs")
    asked = high if low == high else max(low or 1, min(high or 1, cluster.max_workers(cpus_per_worker or 1, gpu)))
    if gpu:
        workers = asked or cluster.gpus
        most = min(CORES_A_WORKER, max(1, cluster.room // workers))
    else:
        workers = asked or 1
        most = min(cores_a_worker, max(1, cluster.room // workers), max(cluster.node_cpus))
    if gpu and workers > cluster.gpus:
        raise UserError(f"--num_workers {workers}: only {cluster.gpus} GPUs are there ({cluster.describe()})")
    # The largest share of the cores that still lets all workers find a node.
    fits = (cpus for cpus in range(most, 1, -1) if cluster.max_workers(cpus, gpu) >= workers)
    cpus = cpus_per_worker or next(fits, 1)
    if not gpu and not asked:
        workers = max(1, cluster.max_workers(cpus, gpu))
    plan = Plan(workers, cpus, int(gpu))
    _check(cluster, plan)
    return replace(plan, range=(low, high)) if low and high and low < high else plan


def _check(cluster: Cluster, plan: Plan) -> None:
    fitting = cluster.max_workers(plan.cpus, plan.gpus > 0)
    if plan.workers > fitting:
        left = "" if cluster.own else " and leave 1 CPU for reading"
        raise UserError(
            f"{plan.describe('worker')} do not fit {cluster.describe()}{left}: at most --num_workers {fitting}"
            + (f" with --cpus_per_worker {plan.cpus}" if fitting else ", or a lower --cpus_per_worker")
        )


def _count(num_workers: str | None, elastic: bool) -> tuple[int, int] | None:
    """The fewest and the most workers that were asked for."""
    if num_workers is None:
        return None
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", num_workers, re.ASCII)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise UserError(
            f"--num_workers must be a whole number of at least 1, or MIN-MAX of such, found «{num_workers}»"
        )
    if low < high and not elastic:
        raise UserError(
            f"--num_workers {num_workers}: only the workers of raybge.train and raybge.pretrain come and go; give one "
            "number"
        )
    return low, high


def current_cluster() -> Cluster:
    """The cluster that this process is connected to, as it is now."""
    return _look(_own)


def _look(own: bool) -> Cluster:
    import ray

    alive = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    node_cpus = tuple(int(r.get("CPU", 0)) - (_reading_slots() if own else 0) for r in alive)
    node_gpus = tuple(int(r.get("GPU", 0)) for r in alive)
    memory = int(sum(r.get("memory", 0) for r in alive))
    return Cluster(own, sum(node_cpus), sum(node_gpus), len(alive), node_cpus, node_gpus, memory)


def head_address() -> str:
    """Of the node that the cluster was started on."""
    import ray

    return str(next(n["NodeManagerAddress"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]))


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reading_slots() -> int:
    return max(2, available_cores() // 4)


def concurrent_runs(cluster: Cluster, plan: Plan) -> int:
    """Runs of a plan that the cluster holds at a time, with a CPU for the reading of each."""
    reading = cluster.cpus + (_reading_slots() if cluster.own else 0)
    fitting = min(cluster.max_workers(plan.cpus, plan.gpus > 0) // plan.workers, reading // (plan.workers * plan.cpus + 1))
    return max(1, fitting)


def reading_cpus(cluster: Cluster, plan: Plan, runs: int = 1) -> float:
    """CPUs for each training worker's reading: an even share of what the workers of `runs` runs leave.

    A paused reading task keeps its CPU. Where one worker's task could take another's share, the other would read
    nothing, and both would wait for each other in the next collective.
    """
    workers = plan.workers * runs
    free = _reading_slots() if cluster.own else cluster.cpus - workers * plan.cpus
    return max(free / workers, 1e-3)


def _start() -> None:
    import ray
    from ray._private import ray_constants

    if os.environ.get(OPEN) == "0":  # a program may have imported Ray before this was set
        ray_constants.ENABLE_RAY_CLUSTER = False
    options: dict[str, Any] = {"num_cpus": available_cores() + _reading_slots(), "include_dashboard": False}
    ray.init(address="local", log_to_driver=True, **options)


def _join(address: str) -> None:
    import ray

    # Ray itself asks an address where nobody answers for minutes.
    if re.fullmatch(r"[^/]+:\d+", address) and not _answers(address):
        raise UserError(f"cannot join the Ray cluster at {address}: nothing answers there")
    try:
        ray.init(address=address, log_to_driver=True)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError and its own kinds for the same cause
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot join the Ray cluster at {address}: {reason}") from error


def _live_head() -> str | None:
    """Address of a `ray start` on this machine that still answers: a head that died leaves its file behind."""
    path = address_file()
    if not path.is_file():
        return None
    address = path.read_text().strip()
    return address if _answers(address) else None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return True
    except (OSError, ValueError):
        return False


def address_file() -> Path:
    """Where `ray start` leaves its address; without importing Ray, since what is set before that depends on it."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(folder) / "ray" / "ray_current_cluster"


def _quiet(verbose: bool) -> None:
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about a coming default
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if not verbose else "true")
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = verbose
    context.execution_options.preserve_order = True
