"""What Ray Train holds for a run: the CPUs and GPUs of its workers, given back where Ray does not, and few actors.

Ray keeps a placement group until the actor and the job that made it are both gone. Of a run that was ended from
outside, such as a trial that a search stops, the actor goes and the job stays. Ray Train has a cleaner for it: an
actor of 200 MB beside each run, which asks the dashboard whether its run lives. A Ray that raybge starts has none, and
there a cleaner would stay, as the group does. So worker 0 notes the group beside the run's output, who comes next
removes it, and there is no cleaner.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.util.filesystem import STATE_FOLDER

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

NOTE = "placement-group"


def record_placement_group(output: str | Path, group: Any) -> None:
    """The run with this output folder holds this placement group."""
    place = Path(output, STATE_FOLDER, NOTE)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(group.id.hex())


def release_placement_group(output: str | Path) -> None:
    """Give back what a run with this output folder held when it ended. It must have ended."""
    import ray
    from ray.util.placement_group import PlacementGroup

    place = Path(output, STATE_FOLDER, NOTE)
    if place.is_file():
        group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(place.read_text())))
        ray.util.remove_placement_group(group)
        place.unlink(missing_ok=True)


def trainer() -> type[TorchTrainer]:
    """Ray Train's TorchTrainer without its cleaner, and without the actor that shares out data given to a trainer."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class DataContextCallback(DatasetsCallback):
        """Only hands the driver's DataContext to the workers, which read their rows themselves."""

        def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
            return {}

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            left_out = (DatasetsCallback, PlacementGroupCleanerCallback)
            kept = [each for each in super()._create_default_callbacks() if not isinstance(each, left_out)]
            return [*kept, DataContextCallback(self.train_run_context, self.datasets)]

    return Trainer
