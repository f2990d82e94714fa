"""Ray Train as the runtime of a training run."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.cluster.placement_groups import record_placement_group, release_placement_group
from raybge.training.checkpoint.manifest import checkpoint_name
from raybge.training.health.run_state import RunState, RunStateLostError, RunStateStore
from raybge.util.redaction import redact

if TYPE_CHECKING:
    import pyarrow as pa

    from raybge.cli.console import Console
    from raybge.cluster.resources import Cluster, Plan
    from raybge.cluster.spec import ScaleSpec
    from raybge.data.stream import StepStream
    from raybge.training.health.run_state import WorkerHandle
    from raybge.training.runtime import WorkerSettings
    from raybge.training.worker_config import WorkerConfig

# Ray Train polls the workers' status at this interval. A checkpoint is not reported before a poll has returned the
# previous one, and the end of a run waits for its last. Ray's default of 2 s only pays off if polling itself is work.
STATUS_POLL_SECONDS, MAX_STATUS_POLLS_PER_SECOND = 0.5, 256


class RayRuntime:
    """Workers that Ray Train starts; implements `Runtime`."""

    def connect(self, scale: ScaleSpec, console: Console) -> AbstractContextManager[Cluster]:
        """Join or start a Ray cluster; see `ScaleSpec.connect`."""
        return scale.connect(console)

    def create_run_state(self) -> RunState:
        """Create the state as a small Ray actor."""
        return RunState(RayStateServer())

    def run_workers(
        self,
        function: Callable[[WorkerSettings], None],
        config: WorkerConfig,
        plan: Plan,
        process_group: dict[str, Any],
        folder: Path,
    ) -> None:
        """Run Ray Train once; see `Runtime.run_workers`."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        from raybge.cluster.process_group import NodeTorchConfig
        from raybge.compat.ray import torch_trainer_without_helpers

        poll_seconds = max(STATUS_POLL_SECONDS, plan.workers / MAX_STATUS_POLLS_PER_SECOND)
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(poll_seconds))
        # One more actor per run, which announces that a node will be preempted: nothing here uses it.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        settings: WorkerSettings = {"worker": config, "context": RayWorkerContext}
        torch_trainer_without_helpers()(
            function,
            train_loop_config=settings,
            scaling_config=ScalingConfig(
                num_workers=plan.workers,
                use_gpu=bool(plan.gpus),
                resources_per_worker={"CPU": plan.cpus, "GPU": plan.gpus},
            ),
            torch_config=NodeTorchConfig(**process_group),
            run_config=RunConfig(
                name=uuid.uuid4().hex,  # Ray Train would continue a run of a known name
                storage_path=str(folder),
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
            ),
        ).fit()

    def release(self, output_dir: str) -> None:
        """Remove the placement group of an attempt that was killed."""
        release_placement_group(output_dir)


class RayWorkerContext:
    """Surroundings of a worker of Ray Train; implements `WorkerContext`."""

    def __init__(self) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.attempt = context.get_experiment_name()
        self.address = ray.util.get_node_ip_address()
        self.handle: WorkerHandle = RayWorkerHandle(ray.get_runtime_context().current_actor)

    def record_resources(self, output_dir: str) -> None:
        """Record the placement group of the workers."""
        import ray

        record_placement_group(output_dir, ray.util.get_current_placement_group())

    def read_steps(self, stream: StepStream) -> Iterator[pa.Table]:
        """Read with a Ray Data pipeline of this worker's own."""
        from raybge.data.stream import read_with_ray

        return read_with_ray(stream)

    def report_checkpoint(self, path: str) -> None:
        """Report a checkpoint to Ray Train. It stays where it is: Ray stores a pointer of a few bytes."""
        import ray.train

        pointer = None
        if self.rank == 0:
            storage = ray.train.get_context().get_storage()
            folder = Path(storage.experiment_fs_path) / checkpoint_name(path)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "pointer.json").write_text(json.dumps({"path": redact(path)}))
            pointer = ray.train.Checkpoint.from_directory(folder)
        mode = ray.train.CheckpointUploadMode.NO_UPLOAD
        ray.train.report({"checkpoint": redact(path)}, checkpoint=pointer, checkpoint_upload_mode=mode)


class RayWorkerHandle:
    """Handle of a worker that is a Ray actor; implements `WorkerHandle`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def kill(self) -> None:
        """Kill the worker, whichever node it is on."""
        import ray

        try:
            ray.kill(self._actor)
        except ray.exceptions.RayError as error:
            raise RunStateLostError(str(error)) from error


class RayStateServer:
    """Run state in a Ray actor on the driver's node; implements `StateServer`. Serializable."""

    def __init__(self) -> None:
        import ray

        # Pinned to the driver's node, and not softly, which lets Ray place it elsewhere at times: on a worker's node
        # the actor would be lost with that node, and the whole run with it.
        driver_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._actor = ray.remote(RunStateStore).options(num_cpus=0, scheduling_strategy=driver_node).remote()

    def send(self, method: str, *values: Any, **named: Any) -> None:
        """Call a method of the state and return at once; RunStateLostError if Ray was shut down."""
        import ray

        try:
            getattr(self._actor, method).remote(*values, **named)
        except ray.exceptions.RayError as error:
            raise RunStateLostError(str(error)) from error

    def call(self, method: str, *values: Any, **named: Any) -> Any:
        """Call a method of the state and return its result; RunStateLostError if the actor is gone."""
        import ray

        try:
            return ray.get(getattr(self._actor, method).remote(*values, **named))
        except ray.exceptions.RayError as error:
            raise RunStateLostError(str(error)) from error
