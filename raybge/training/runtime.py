"""Interfaces between a training run and the processes that it runs in.

The driver uses a `Runtime`, each worker a `WorkerContext`. `ray_runtime.py` implements them with Ray Train; tests run
the same workers as plain processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

if TYPE_CHECKING:
    import pyarrow as pa

    from raybge.cli.console import Console
    from raybge.cluster.resources import Cluster, Plan
    from raybge.cluster.spec import ScaleSpec
    from raybge.data.stream import StepStream
    from raybge.training.health.run_state import RunState, WorkerHandle
    from raybge.training.worker_config import WorkerConfig


class WorkerSettings(TypedDict):
    """Argument of the function that each worker runs.

    Args:
        worker: configuration of the worker.
        context: called without arguments in the worker's process.
    """

    worker: WorkerConfig
    context: Callable[[], WorkerContext]


class Runtime(Protocol):
    """Processes of a training run, used by the driver."""

    def connect(self, scale: ScaleSpec, console: Console) -> AbstractContextManager[Cluster]:
        """Return a context manager in which the resources that workers share can be used."""

    def create_run_state(self) -> RunState:
        """Create the state that driver and workers share. Called while connected."""

    def run_workers(
        self,
        function: Callable[[WorkerSettings], None],
        config: WorkerConfig,
        plan: Plan,
        process_group: dict[str, Any],
        folder: Path,
    ) -> None:
        """Run a function in every worker of a new process group; return when all have ended.

        Args:
            function: function that the workers run.
            config: configuration of the workers.
            plan: number of workers and the resources of each.
            process_group: `backend`, as torch names it, and `timeout_s`, its timeout in seconds.
            folder: folder for records of this run.

        Raises:
            BaseException: the exception of a worker, or one whose attribute `worker_failures` maps ranks to exceptions.
        """

    def release(self, output_dir: str) -> None:
        """Release the resources of killed workers that wrote into `output_dir`."""


class WorkerContext(Protocol):
    """Surroundings of one worker."""

    rank: int
    world: int  # number of workers
    attempt: str  # name, the same in all workers, that no other attempt of the run has
    address: str  # of the worker's node
    handle: WorkerHandle  # with which the driver kills this worker

    def record_resources(self, output_dir: str) -> None:
        """Record what `Runtime.release` has to release. Called by worker 0."""

    def read_steps(self, stream: StepStream) -> Iterator[pa.Table]:
        """Read the steps of the stream's epoch and worker, each as the tokenizer's table of one row."""

    def report_checkpoint(self, path: str) -> None:
        """Report a complete checkpoint. Called by every worker."""
