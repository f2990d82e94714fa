"""Records of a search's trials, their ranking, and the two files that contain all of them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raybge.tuning.search_space import Domain
from raybge.util.atomic_write import open_atomic

STATUSES = ("finished", "stopped", "failed", "running")  # stopped: by the scheduler, before the last step


@dataclass(frozen=True)
class Trial:
    """One training run of a search.

    Args:
        number: position in the order in which trials began, from 1.
        flags: hyperparameters by flag name.
        status: one of STATUSES.
        curve: (step, metric) of each evaluation, in order.
        metrics: last value of each metric by name; empty without an evaluation.
        seconds: duration.
        error: reason of a failure; None without one.
        id: identifier in Ray Tune, and name of the trial's folder.
        history: (step, flags) that made its model: the hyperparameters from each number of updates on.
    """

    number: int
    flags: dict[str, Any]
    status: str
    curve: list[tuple[int, float]]
    metrics: dict[str, float]
    seconds: float
    error: str | None = None
    id: str = ""
    history: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Step of the last evaluation; 0 without one."""
        return self.curve[-1][0] if self.curve else 0

    def score(self, metric: str) -> float | None:
        """Return the last value of a metric; None if it is missing or not finite."""
        value = self.metrics.get(metric)
        return value if value is not None and math.isfinite(value) else None


def ranked_trials(trials: Iterable[Trial], metric: str, mode: str) -> list[Trial]:
    """Return the trials from best to worst; equal ones by number, those without the metric last.

    Args:
        trials: trials in any order.
        metric: name of the metric.
        mode: "max" or "min".

    Returns:
        All trials.
    """
    sign = -1 if mode == "max" else 1

    def key(trial: Trial) -> tuple[bool, float, int]:
        score = trial.score(metric)
        return score is None, sign * (score or 0.0), trial.number

    return sorted(trials, key=key)


def best_trial(trials: Iterable[Trial], metric: str, mode: str) -> Trial | None:
    """Return the best finished trial, or without one the best of the others; None if none has the metric.

    Finished trials come first, since a stopped trial's metric is not the result of its hyperparameters.

    Args:
        trials: trials in any order.
        metric: name of the metric.
        mode: "max" or "min".

    Returns:
        The trial.
    """
    scored = [trial for trial in ranked_trials(trials, metric, mode) if trial.score(metric) is not None]
    return next((trial for trial in scored if trial.status == "finished"), scored[0] if scored else None)


def write_csv(path: str, trials: Sequence[Trial], space: Mapping[str, Domain]) -> None:
    """Write one line per trial, by number: status, hyperparameters, metrics, steps, seconds, error."""
    flags = _keys([space, *(trial.flags for trial in trials)])
    metrics = _keys(trial.metrics for trial in trials)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["number", "status", *flags, *metrics, "steps", "seconds", "error"])
    for trial in sorted(trials, key=lambda trial: trial.number):
        values = [trial.flags.get(name) for name in flags] + [trial.metrics.get(name) for name in metrics]
        rows.writerow([trial.number, trial.status, *values, trial.steps, trial.seconds, trial.error])
    _write(path, text.getvalue())


def write_json(path: str, trials: Sequence[Trial], space: Mapping[str, Domain]) -> None:
    """Write the search space in the syntax of the command line, and every trial with its curve."""
    content = {
        "space": {name: str(domain) for name, domain in space.items()},
        "trials": [asdict(trial) for trial in sorted(trials, key=lambda trial: trial.number)],
    }
    _write(path, json.dumps(_finite_or_null(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the distinct keys of all mappings in order of their first occurrence."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _finite_or_null(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot express, by None at any depth."""
    if isinstance(value, dict):
        return {key: _finite_or_null(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: str, text: str) -> None:
    with open_atomic(path, "--output_dir") as out:
        out.write(text.encode())
