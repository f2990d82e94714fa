"""Population based training (https://arxiv.org/abs/1711.09846): bad trials continue from good ones with other values.

Ray Tune selects these trials. It passes the path of a checkpoint from trial to trial: a trial trains in attempts, each
with a folder of its own, from the beginning or from a checkpoint of another attempt. Trials that pause do the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybge.training.checkpoint.manifest import MANIFEST
from raybge.tuning.search_space import Domain
from raybge.tuning.trial_spec import PBT_INTERVAL
from raybge.util.errors import UserError

PBT_FLAGS = ("learning_rate", "temperature", "max_grad_norm")  # that may change between two updates of a run
ATTEMPTS, ATTEMPT_FILE, POINTER = "attempts", "attempt.json", "pointer.json"


@dataclass(frozen=True)
class TrialAttempt:
    """Training run of a trial, from a checkpoint or from the beginning.

    Args:
        folder: folder of its checkpoints.
        start: checkpoint to continue from; None: from the beginning.
    """

    folder: Path
    start: str | None

    @classmethod
    def begin(cls, trial: Path, hyperparameters: Mapping[str, Any], checkpoint: Any) -> TrialAttempt:
        """Begin the next attempt of a trial.

        Args:
            trial: the trial's folder.
            hyperparameters: sampled values, recorded in the attempt's folder.
            checkpoint: Ray Tune's checkpoint, made by `pointer`; None: start from the beginning.

        Returns:
            The attempt, whose folder exists.
        """
        start = json.loads(Path(checkpoint.path, POINTER).read_text()) if checkpoint else None
        number = len([*(trial / ATTEMPTS).glob("*")])
        attempt = cls(trial / ATTEMPTS / str(number), start)
        attempt.folder.mkdir(parents=True)
        (attempt.folder / ATTEMPT_FILE).write_text(json.dumps({"flags": dict(hyperparameters), "start": start}))
        return attempt

    @property
    def step(self) -> int:
        """Number of updates before the attempt."""
        return _step(Path(self.start)) if self.start else 0

    def flags(self) -> dict[str, Any]:
        """Return the flags of raybge.train that make a run this attempt."""
        return {"storage_path": str(self.folder), **({"resume_from_checkpoint": self.start} if self.start else {})}

    def has_checkpoint(self, step: int) -> bool:
        """Return whether the checkpoint after `step` updates is complete."""
        return (self._checkpoint(step) / MANIFEST).is_file()

    def pointer(self, step: int) -> Any:
        """Return a Ray Tune checkpoint that contains only the path of the attempt's checkpoint, since Ray copies it."""
        from ray import tune

        folder = self.folder / f"pointer-{step}"
        folder.mkdir(exist_ok=True)
        (folder / POINTER).write_text(json.dumps(str(self._checkpoint(step))))
        return tune.Checkpoint.from_directory(folder)

    def _checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"


def read_history(trial: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the hyperparameters that made a trial's model, across the attempts it continues from.

    Args:
        trial: the trial's folder.

    Returns:
        (number of updates before, hyperparameters from there on); empty without attempts.
    """
    attempts = sorted((trial / ATTEMPTS).glob("*"), key=lambda path: int(path.name))
    return _read_history(attempts[-1]) if attempts else []


def _read_history(attempt: Path) -> list[tuple[int, dict[str, Any]]]:
    record = json.loads((attempt / ATTEMPT_FILE).read_text())
    if record["start"] is None:
        return [(0, record["flags"])]
    start = Path(record["start"])
    before = _read_history(start.parent)
    return before if before[-1][1] == record["flags"] else [*before, (_step(start), record["flags"])]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def check_population(space: Mapping[str, Domain], mines: bool) -> None:
    """Raise UserError for a search whose flags cannot change while trials train.

    Args:
        space: domain of each searched flag.
        mines: each trial mines its negatives first.
    """
    if other := [name for name in space if name not in PBT_FLAGS]:
        raise UserError(
            f"--scheduler pbt changes flags while a trial trains: it can search {', '.join(PBT_FLAGS)}, not {other[0]}"
        )
    if mines:
        raise UserError(
            "--mine_config does not go together with --scheduler pbt: its trials continue from each other's "
            "checkpoints, which requires equal data"
        )


def pbt_scheduler(space: Mapping[str, Domain], time_attr: str) -> Any:
    """Return Ray Tune's scheduler. It multiplies a value by 0.8 or 1.2 or samples it again, within its domain.

    Args:
        space: domain of each searched flag.
        time_attr: key of a report's share of the run in percent.

    Returns:
        A `ray.tune.schedulers.PopulationBasedTraining`.
    """
    from ray.tune import schedulers

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        return {name: _clip(space[name], value) for name, value in config.items()}

    mutations = {name: list(d.arguments) if d.categorical else d.to_ray() for name, d in space.items()}
    return schedulers.PopulationBasedTraining(
        time_attr=time_attr,
        perturbation_interval=PBT_INTERVAL,
        hyperparam_mutations=mutations,
        custom_explore_fn=explore,
        log_config=False,
    )


def _clip(domain: Domain, value: Any) -> Any:
    if domain.categorical:
        return value
    if domain.function == "quniform":
        value = round(value / domain.arguments[2]) * domain.arguments[2]
    return min(max(value, domain.lo), domain.hi)


def trial_resources(runs: int, head_address: str) -> dict[str, float]:
    """Return the resources of each trial with which at most `runs` fit the cluster at a time.

    Ray Tune's own limit counts paused trials, and a population is larger than the number of trials that run at a time.
    Trials therefore share the resource of the head's address, which Ray counts in ten thousandths and nothing else
    requests. (Not the resource that marks the head: Ray Train requests a little of it in each run, and would block.)

    Args:
        runs: most trials at a time.
        head_address: IP address of the cluster's head.

    Returns:
        Amounts by resource name.
    """
    return {f"node:{head_address}": 10_000 // runs / 10_000}
