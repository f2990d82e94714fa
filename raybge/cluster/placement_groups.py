"""Placement groups of training runs: recorded next to a run's output, and removed if Ray does not remove them.

Ray keeps a placement group, and so the workers' CPUs and GPUs, until both the actor and the job that created it are
gone. If a run is ended from outside, such as a trial that a search stops, its actor ends and its job continues. So
worker 0 records the group, and the next attempt or the search removes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raybge.util.filesystem import STATE_FOLDER

RECORD = "placement-group"


def record_placement_group(output: str | Path, group: Any) -> None:
    """Record the placement group of the run that writes into `output`."""
    path = Path(output, STATE_FOLDER, RECORD)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(group.id.hex())


def release_placement_group(output: str | Path) -> None:
    """Remove the placement group of the run that wrote into `output`, if one is recorded. The run has to have ended."""
    import ray
    from ray.util.placement_group import PlacementGroup

    path = Path(output, STATE_FOLDER, RECORD)
    if path.is_file():
        group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(path.read_text())))
        ray.util.remove_placement_group(group)
        path.unlink(missing_ok=True)
