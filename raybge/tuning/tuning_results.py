"""Results of a search in its output folder: tables, report and the best model; progress on the console."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from raybge.cli.console import Console
from raybge.report.page import REPORT
from raybge.tuning.command_lines import reproduction_commands
from raybge.tuning.population import ATTEMPTS
from raybge.tuning.records import Trial, best_trial, write_csv, write_json
from raybge.tuning.spec import TuningSpec
from raybge.tuning.trial import MODEL
from raybge.tuning.trial_spec import TrialSpec
from raybge.util.errors import UserError

BEST, TRIALS, BEST_FILE = "best", "trials", "best.json"
RESULT_FILES = (BEST_FILE, "trials.csv", "trials.json", REPORT)


@dataclass(frozen=True)
class TuningResult:
    """Result of `raybge.tune_finetune`: the best trial; all fields are empty on a dry run.

    Args:
        model: folder of its model.
        flags: values of the searched flags.
        metrics: its metrics by name, such as "nDCG@10".
        command: command line that trains it again.
        trials: table of all trials, a .csv file.
        report: page of the search.
    """

    model: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    command: str = ""
    trials: str | None = None
    report: str | None = None

    @classmethod
    def read(cls, output: Path) -> Self:
        """Read the result of a finished search from its output folder."""
        best = json.loads((output / BEST_FILE).read_text())
        return cls(str(output / BEST), **best, trials=str(output / "trials.csv"), report=str(output / REPORT))


@contextmanager
def report_progress(
    spec: TuningSpec, trial_spec: TrialSpec, console: Console
) -> Iterator[Callable[[Sequence[Trial]], None]]:
    """Provide a function to call with all trials after each change.

    It prints a line for each trial that has ended, and writes the tables and the report.

    Args:
        spec: the search.
        trial_spec: configuration of all trials.
        console: shows the progress bar.

    Yields:
        The function.
    """
    printed: set[int] = set()
    last_state: list[Any] = []
    with console.bar("search", spec.search.trials, "trial") as bar:

        def on_change(trials: Sequence[Trial]) -> None:
            ended = [trial for trial in trials if trial.status != "running"]
            for trial in ended:
                if trial.number not in printed:
                    printed.add(trial.number)
                    console.message(_trial_line(trial, spec.search.metric))
            state = [(trial.status, trial.steps) for trial in trials]
            if state != last_state:
                write_results(spec, trial_spec, trials)
                last_state[:] = state
            bar.update(len(ended) - bar.n)

        yield on_change


def write_results(spec: TuningSpec, trial_spec: TrialSpec, trials: Sequence[Trial]) -> None:
    """Write the tables and the report of all trials so far."""
    from raybge.tuning.page import TuningReport, write

    search = spec.search
    write_csv(str(spec.output / "trials.csv"), trials, search.space)
    write_json(str(spec.output / "trials.json"), trials, search.space)
    best = best_trial(trials, search.metric, search.mode)
    report = TuningReport(
        command=spec.command,
        metric=search.metric,
        mode=search.mode,
        space=search.space,
        trials=trials,
        best_commands=reproduction_commands(trial_spec, best.history) if best else (),
        facts={"model": spec.model, "early stopping": search.scheduler},
    )
    write(str(spec.output / REPORT), report)


def finish_search(spec: TuningSpec, trial_spec: TrialSpec, trials: Sequence[Trial], console: Console) -> TuningResult:
    """Move the best model into the output folder, remove temporary files and print the result.

    Args:
        spec: the search.
        trial_spec: configuration of all trials.
        trials: all trials.
        console: receives the result.

    Returns:
        The best trial.

    Raises:
        UserError: no trial finished.
    """
    output = spec.output
    best = best_trial(trials, spec.search.metric, spec.search.mode)
    if best is None or best.status != "finished":
        raise UserError(f"no trial finished: {output / 'trials.csv'} has the reasons")
    model = output / TRIALS / best.id / MODEL
    if model.is_dir():
        shutil.rmtree(output / BEST, ignore_errors=True)
        model.rename(output / BEST)
    command = " && ".join(map(shlex.join, reproduction_commands(trial_spec, best.history)))
    record = {"flags": best.flags, "metrics": best.metrics, "command": command}
    (output / BEST_FILE).write_text(json.dumps(record, indent=1) + "\n")
    for folder in (Path(trial_spec.shared), *(output / TRIALS).glob(f"*/{ATTEMPTS}")):
        shutil.rmtree(folder, ignore_errors=True)
    console.info(_trial_line(best, spec.search.metric))
    console.info(f"best: {output / BEST}\nall trials: {output / 'trials.csv'}\nreport: {output / REPORT}")
    console.info(f"command that trains the best model again:\n  {command}")
    return TuningResult.read(output)


def _trial_line(trial: Trial, metric: str) -> str:
    score = trial.score(metric)
    result = f"{metric} {score:.4f}" if score is not None else trial.error or "no evaluation"
    values = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in trial.flags.items()
    )
    return f"trial {trial.number}: {trial.status} at step {trial.steps:,} in {trial.seconds:,.0f} s, {result}; {values}"
