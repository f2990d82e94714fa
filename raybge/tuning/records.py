"""What a search has tried: one record a trial, the best of them, and the two files that hold them all."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raybge.tuning.search_space import Domain
from raybge.util.atomic_write import written_aside

STATUSES = ("finished", "stopped", "failed", "running")  # stopped: by the scheduler, before its last step


@dataclass(frozen=True)
class Trial:
    """One training run of a search.

    Args:
        number: which one it is, in the order in which they began.
        flags: those that the search has set, by name.
        status: one of STATUSES.
        curve: (step, metric) of each measurement, in order.
        metrics: the last value of each metric, by name; empty where nothing was measured.
        seconds: how long it ran.
        error: why it failed, or None.
        id: Ray Tune's name for it, and its folder's.
        history: (step, flags) of what made its model: which flags held, from which update on.
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
        """The last step that was measured."""
        return self.curve[-1][0] if self.curve else 0

    def score(self, metric: str) -> float | None:
        """The trial's value of a metric; None where it was not measured or is not a number."""
        value = self.metrics.get(metric)
        return value if value is not None and math.isfinite(value) else None


def ranked(trials: Iterable[Trial], metric: str, mode: str) -> list[Trial]:
    """The trials from best to worst ("max" or "min" is best), equal ones by number; last those without the metric."""
    sign = -1 if mode == "max" else 1

    def place(trial: Trial) -> tuple[bool, float, int]:
        score = trial.score(metric)
        return score is None, sign * (score or 0.0), trial.number

    return sorted(trials, key=place)


def best(trials: Iterable[Trial], metric: str, mode: str) -> Trial | None:
    """The best trial; None where none has the metric.

    A finished trial comes before any other: what a stopped one measured is not what its flags lead to.
    """
    scored = [trial for trial in ranked(trials, metric, mode) if trial.score(metric) is not None]
    return next((trial for trial in scored if trial.status == "finished"), scored[0] if scored else None)


def write_csv(path: str, trials: Sequence[Trial], space: Mapping[str, Domain]) -> None:
    """One line a trial in order of number: status, searched flags, metrics, steps, seconds, error."""
    flags = _names([space, *(trial.flags for trial in trials)])
    metrics = _names(trial.metrics for trial in trials)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["number", "status", *flags, *metrics, "steps", "seconds", "error"])
    for trial in sorted(trials, key=lambda trial: trial.number):
        values = [trial.flags.get(name) for name in flags] + [trial.metrics.get(name) for name in metrics]
        rows.writerow([trial.number, trial.status, *values, trial.steps, trial.seconds, trial.error])
    _write(path, text.getvalue())


def write_json(path: str, trials: Sequence[Trial], space: Mapping[str, Domain]) -> None:
    """The space as it is written on the command line, and every trial with its curve."""
    content = {
        "space": {name: str(domain) for name, domain in space.items()},
        "trials": [asdict(trial) for trial in sorted(trials, key=lambda trial: trial.number)],
    }
    _write(path, json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys of all mappings, each once, in the order in which they are met."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: str, text: str) -> None:
    with written_aside(path, "--output_dir") as out:
        out.write(text.encode())
