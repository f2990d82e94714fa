"""Scale of a run: worker count, resources per worker, the Ray cluster to join and the shared storage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raybge.cli.options import CommonOptions
from raybge.cluster.connection import connect
from raybge.cluster.resources import CORES_A_WORKER, Cluster, Plan, plan_workers

if TYPE_CHECKING:
    from raybge.cli.console import Console


@dataclass(frozen=True)
class ScaleSpec:
    """Scale flags of a command (`--num_workers` to `--address`).

    Args:
        num_workers: "N" or, for elastic training, "MIN-MAX"; None lets the cluster decide.
        use_gpu: one GPU per worker; None uses GPUs if the cluster has any.
        cpus_per_worker: CPU cores, and threads, of each worker; None lets the cluster decide.
        address: Ray cluster to join; None: RAY_ADDRESS, a live `ray start`, or this machine.
        storage_path: shared folder or URI for data that a run keeps between its processes.
        verbose: leave the messages of Ray and transformers on the console.
    """

    num_workers: str | None = None
    use_gpu: bool | None = None
    cpus_per_worker: int | None = None
    address: str | None = None
    storage_path: str | None = None
    verbose: bool = False

    @classmethod
    def from_options(cls, options: CommonOptions, on_cpu: bool = False) -> ScaleSpec:
        """Read the scale flags that every command on Ray has; `on_cpu` uses no GPU where the flags leave it open."""
        return cls(
            options.num_workers,
            False if on_cpu and options.use_gpu is None else options.use_gpu,
            options.cpus_per_worker,
            options.address,
            options.storage_path,
            options.verbose,
        )

    @contextmanager
    def connect(self, console: Console) -> Iterator[Cluster]:
        """Join or start the Ray cluster; it is left again at the end of the `with` block.

        Ray's messages and those of its processes go to the console's log file. In a program that uses raybge as a
        library, which has none, they are only shown with --verbose; there
        a Ray that was started stays for the next call.

        Args:
            console: names the phase while it lasts.

        Yields:
            The cluster.
        """
        joins = self.address or os.environ.get("RAY_ADDRESS")
        with ExitStack() as stack:
            with console.phase("joining the Ray cluster" if joins else "starting Ray"):
                cluster = stack.enter_context(
                    connect(self.address, self.verbose, console.shows_messages, console.keeps_ray)
                )
            yield cluster

    def plan(self, cluster: Cluster, *, cores_a_worker: int = CORES_A_WORKER, elastic: bool = False) -> Plan:
        """Plan workers or actors on a cluster.

        Args:
            cluster: the connected cluster.
            cores_a_worker: most CPU cores of a CPU worker if `cpus_per_worker` is unset.
            elastic: accept MIN-MAX as the worker count.

        Returns:
            Number of workers and the resources of each.

        Raises:
            UserError: the cluster cannot hold the requested workers.
        """
        return plan_workers(
            cluster,
            self.num_workers,
            self.use_gpu,
            self.cpus_per_worker,
            cores_a_worker=cores_a_worker,
            elastic=elastic,
        )
