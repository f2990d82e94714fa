"""Parts of Ray without a stability promise. Nothing of Ray is imported before a function is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raybge.compat.versions import require

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


def keep_ports_on_loopback() -> None:
    """Bind the ports of a Ray that this process starts to the loopback interface.

    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 has this effect only if it is set before Ray is imported; a program that uses
    raybge as a library may have imported Ray earlier.
    """
    from ray._private import ray_constants

    require(ray_constants, "ENABLE_RAY_CLUSTER", "ray")  # without it the ports would be open, and nothing would say so
    ray_constants.ENABLE_RAY_CLUSTER = False


def torch_trainer_without_helpers() -> type[TorchTrainer]:
    """Return Ray Train's TorchTrainer without its two helper actors of 200 MB each.

    One removes the placement group of a dead run, but asks the dashboard for it, which a local Ray does not have. The
    other distributes data sets that are passed to the trainer; raybge's workers read their rows themselves. No option
    switches them off. If Ray has changed, the trainer is Ray's own: only memory is lost.
    """
    from ray.train.torch import TorchTrainer

    try:
        from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    except ImportError:
        return TorchTrainer

    class DataContextCallback(DatasetsCallback):
        """Passes the driver's DataContext to the workers, and no data sets."""

        def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
            return {}

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            replaced = (DatasetsCallback, PlacementGroupCleanerCallback)
            callbacks = [each for each in super()._create_default_callbacks() if not isinstance(each, replaced)]
            return [*callbacks, DataContextCallback(self.train_run_context, self.datasets)]

    return Trainer


def is_autoscaling() -> bool:
    """Return True if the connected cluster starts machines on request (`ray up`, KubeRay).

    Ray has no public function for it. False if Ray has changed: a command then does not wait for machines.
    """
    try:
        from ray.autoscaler.v2.utils import is_autoscaler_v2
    except ImportError:
        return False
    return bool(is_autoscaler_v2())


def machines_are_starting() -> bool:
    """Return True if the autoscaler has requested a machine that has not joined yet.

    Only the autoscaler's own SDK reports it. False if Ray has changed.
    """
    import ray

    try:
        from ray.autoscaler.v2.sdk import get_cluster_status
    except ImportError:
        return False
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return bool(status.pending_nodes or status.pending_launches)


def keep_keys_out_of_trials() -> None:
    """Stop Ray Tune from copying the driver's AWS keys to its trials in runtime environments, which Ray logs.

    Trials have the keys of their node, as every other process that Ray starts there. Ray Tune has no option for it.
    """
    from ray.tune.execution import class_cache

    names = require(class_cache, "ENV_VARS_TO_PROPAGATE", "ray")  # without it nothing would say that keys are logged
    names.difference_update([name for name in names if name.startswith("AWS_")])
