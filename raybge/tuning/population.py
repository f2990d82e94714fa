"""Population based training (arXiv 1711.09846): trials that do badly go on from those that do well, with other flags.

Ray Tune decides it. What it hands from trial to trial is the path of a checkpoint: a trial trains in attempts, each
with a folder of its own, from the beginning or from the checkpoint of another attempt. So do trials that only pause.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybge.training.checkpoint.manifest import RECORD
from raybge.tuning.search_space import Domain
from raybge.util.errors import UserError

FLAGS = ("learning_rate", "temperature", "max_grad_norm")  # that can change between two updates of a run
INTERVAL = 25  # percent of a run after which a trial may be replaced
ATTEMPTS, ABOUT, POINTER = "attempts", "attempt.json", "pointer.json"


@dataclass(frozen=True)
class Attempt:
    """A training run from the checkpoint `start`, or from the beginning; its checkpoints lie in `folder`."""

    folder: Path
    start: str | None

    @classmethod
    def begin(cls, trial: Path, drawn: Mapping[str, Any], checkpoint: Any) -> Attempt:
        """The next attempt of the trial in folder `trial`. `checkpoint` is Ray Tune's, made by `pointer`, or None."""
        start = json.loads(Path(checkpoint.path, POINTER).read_text()) if checkpoint else None
        number = len([*(trial / ATTEMPTS).glob("*")])
        attempt = cls(trial / ATTEMPTS / str(number), start)
        attempt.folder.mkdir(parents=True)
        (attempt.folder / ABOUT).write_text(json.dumps({"flags": dict(drawn), "start": start}))
        return attempt

    @property
    def step(self) -> int:
        """Updates that were done before."""
        return _step(Path(self.start)) if self.start else 0

    def flags(self) -> dict[str, Any]:
        """Those that the run has for being this attempt."""
        return {"storage_path": str(self.folder), **({"resume_from_checkpoint": self.start} if self.start else {})}

    def has(self, step: int) -> bool:
        """Whether the checkpoint after so many updates is whole."""
        return (self._checkpoint(step) / RECORD).is_file()

    def pointer(self, step: int) -> Any:
        """A checkpoint for Ray Tune: the path of ours, which it copies and hands on."""
        from ray import tune

        place = self.folder / f"pointer-{step}"
        place.mkdir(exist_ok=True)
        (place / POINTER).write_text(json.dumps(str(self._checkpoint(step))))
        return tune.Checkpoint.from_directory(place)

    def _checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"


def history(trial: Path) -> list[tuple[int, dict[str, Any]]]:
    """The flags that made a trial's model, each set with the updates that were done before it came to hold."""
    attempts = sorted((trial / ATTEMPTS).glob("*"), key=lambda path: int(path.name))
    return _history(attempts[-1]) if attempts else []


def _history(attempt: Path) -> list[tuple[int, dict[str, Any]]]:
    about = json.loads((attempt / ABOUT).read_text())
    if about["start"] is None:
        return [(0, about["flags"])]
    start = Path(about["start"])
    before = _history(start.parent)
    return before if before[-1][1] == about["flags"] else [*before, (_step(start), about["flags"])]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def check(space: Mapping[str, Domain], mines: bool) -> None:
    """UserError for a search that cannot change flags while its trials train."""
    if other := [name for name in space if name not in FLAGS]:
        raise UserError(
            f"--scheduler pbt changes flags while a trial trains: it can search {', '.join(FLAGS)}, not {other[0]}"
        )
    if mines:
        raise UserError("--mine_config: trials of --scheduler pbt go on from each other's checkpoints, on equal data")


def scheduler(space: Mapping[str, Domain], time_attr: str) -> Any:
    """Ray Tune's scheduler. A drawn value is multiplied by 0.8 or 1.2, or drawn anew, and stays in its domain."""
    from ray.tune import schedulers

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        return {name: _inside(space[name], value) for name, value in config.items()}

    mutations = {name: list(d.arguments) if d.categorical else d.to_ray() for name, d in space.items()}
    return schedulers.PopulationBasedTraining(
        time_attr=time_attr,
        perturbation_interval=INTERVAL,
        hyperparam_mutations=mutations,
        custom_explore_fn=explore,
        log_config=False,
    )


def _inside(domain: Domain, value: Any) -> Any:
    if domain.categorical:
        return value
    if domain.function == "quniform":
        value = round(value / domain.arguments[2]) * domain.arguments[2]
    return min(max(value, domain.lo), domain.hi)


def resources(runs: int, head: str) -> dict[str, float]:
    """What each trial asks of the cluster so that at most `runs` find room. `head`: the address of its head.

    Ray Tune's own limit counts trials that pause, and a population is larger than what runs at a time. So they share
    the one of the head's address, which Ray counts in ten thousandths and nobody else asks for. (Not the one that
    marks the head: Ray Train asks for a little of it in each run, and would wait for ever.)
    """
    return {f"node:{head}": 10_000 // runs / 10_000}
