"""The CPUs and GPUs that a run's workers hold, given back where Ray does not.

Ray keeps a placement group until the actor and the job that made it are both gone. Of a run that was ended from
outside, such as a trial that a search stops, the actor goes and the job stays; Ray Train's own cleaner then asks the
dashboard, which a Ray started by raybge does not have. So worker 0 notes the group beside the run's output, and who
comes next removes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raybge.checkpoints import HIDDEN

NOTE = "placement-group"


def note(output: str | Path, group: Any) -> None:
    """The run with this output folder holds this placement group."""
    place = Path(output, HIDDEN, NOTE)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(group.id.hex())


def release(output: str | Path) -> None:
    """Give back what a run with this output folder held when it ended. It must have ended."""
    import ray
    from ray.util.placement_group import PlacementGroup

    place = Path(output, HIDDEN, NOTE)
    if place.is_file():
        group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(place.read_text())))
        ray.util.remove_placement_group(group)
        place.unlink(missing_ok=True)
