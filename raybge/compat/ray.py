"""Parts of Ray without a stability promise. Nothing of Ray is imported before a function is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raybge.compat.library_versions import require, require_module

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


@contextmanager
def ports_on_loopback() -> Iterator[None]:
    """Bind the ports of a Ray that this process starts in the block to the loopback interface.

    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 has this effect only if it is set before Ray is imported; a program that uses
    raybge as a library may have imported Ray earlier.

    Raises:
        UnsupportedVersionError: Ray has changed. The ports would be open without a word.
    """
    constants = require_module("ray._private.ray_constants", "ray")
    before = require(constants, "ENABLE_RAY_CLUSTER", "ray")
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


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
            shipped = super()._create_default_callbacks()
            replaced = (DatasetsCallback, PlacementGroupCleanerCallback)
            try:
                context = DataContextCallback(self.train_run_context, self.datasets)
            except (AttributeError, TypeError):
                return shipped
            return [*(each for each in shipped if not isinstance(each, replaced)), context]

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


@contextmanager
def keys_out_of_trials() -> Iterator[None]:
    """Stop Ray Tune from copying the driver's AWS keys to its trials in runtime environments, which Ray logs.

    Trials have the keys of their node, as every other process that Ray starts there. Ray Tune has no option for it.

    Raises:
        UnsupportedVersionError: Ray has changed. Keys would be logged without a word.
    """
    class_cache = require_module("ray.tune.execution.class_cache", "ray")
    names = require(class_cache, "ENV_VARS_TO_PROPAGATE", "ray")
    keys = {name for name in names if name.startswith("AWS_")}
    names.difference_update(keys)
    try:
        yield
    finally:
        names.update(keys)
