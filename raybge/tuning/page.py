"""Report page of hyperparameter tuning: `report.html` in the output folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from raybge.report.charts import element, swatch
from raybge.report.page import render, write_page
from raybge.report.run_details import PageHead, short_names
from raybge.report.series import chart, legend_of
from raybge.report.text import format_duration, format_flag, format_metric, shorten
from raybge.tuning.records import STATUSES, Trial, ranked_trials
from raybge.tuning.search_space import Domain
from raybge.tuning.trial_charts import (
    SHADES,
    SHAPES,
    STATUS_NAMES,
    TrialView,
    learning_curves,
    parallel_coordinates,
    scatter,
)
from raybge.util.plural import plural

WIDE, NARROW = 1072, 440  # widths of a chart on a large screen and on a phone, in pixels
REASON_LENGTH = 240  # characters of a failed trial's error


@dataclass(frozen=True)
class TuningReport:
    """Content of the page.

    Args:
        command: Words of the search's own command.
        metric: The metric that is optimized.
        mode: "max" or "min".
        space: The domain of each searched flag.
        trials: All trials, in any order.
        best_commands: Words of the commands that train the best trial again, in order; empty without a best trial.
        facts: Further facts by name, such as the model and the scheduler.
    """

    command: Sequence[str]
    metric: str
    mode: str
    space: Mapping[str, Domain]
    trials: Sequence[Trial]
    best_commands: Sequence[Sequence[str]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def write(path: str, report: TuningReport) -> None:
    """Write the page to a path or URI."""
    write_page(path, html(report), "--output_dir")


def html(report: TuningReport) -> str:
    """Render the page."""
    view = TrialView(report.trials, report.metric, report.mode, report.space)
    scatters = [chart(drawing) for name in view.space if (drawing := scatter(view, name))]
    table = TrialTable.build(view)
    return render(
        "tuning/page.html.jinja",
        _head(report, view),
        report=report,
        view=view,
        summary=_summary(report),
        figures=_figures(view),
        legend=_legend(view),
        curves=chart(learning_curves(view, WIDE), learning_curves(view, NARROW)),
        parallel=chart(parallel_coordinates(view, WIDE), parallel_coordinates(view, NARROW)),
        scatters=scatters,
        table=table,
    )


# --- heading ----------------------------------------------------------------------------------------------------------


def _head(report: TuningReport, view: TrialView) -> PageHead:
    flags: dict[str, list[str]] = {}
    for word in report.command:
        if word.startswith("--"):
            values = flags.setdefault(word.removeprefix("--"), [])
        elif flags:
            values.append(word)
    return PageHead(
        _title(view),
        "tune",
        run=short_names(flags.get("output_dir", [])),
        model=short_names([report.facts["model"]] if "model" in report.facts else []),
        data=short_names(flags.get("train_data", [])),
    )


def _title(view: TrialView) -> str:
    if view.best is None:
        return f"No trial has measured {view.metric}"
    return f"Best {view.metric}: {format_metric(view.scores[view.best.number])}, trial {view.best.number}"


def _summary(report: TuningReport) -> list[str]:
    counts = Counter(trial.status for trial in report.trials)
    statuses = ", ".join(f"{counts[status]:,} {STATUS_NAMES[status]}" for status in STATUSES if counts[status])
    trials = plural(len(report.trials), "trial")
    return [
        f"{trials}: {statuses}" if report.trials else trials,
        f"{sum(trial.steps for trial in report.trials):,} steps",
        f"{format_duration(sum(trial.seconds for trial in report.trials))} of training",
        f"{'higher' if report.mode == 'max' else 'lower'} {report.metric} is better",
    ]


def _figures(view: TrialView) -> list[tuple[str, str]]:
    """Return the best trial's metric, with the value before its first step if that was measured, and its flags."""
    if view.best is None:
        return []
    score = format_metric(view.scores[view.best.number])
    before = next((value for step, value in view.best.curve if step == 0 and math.isfinite(value)), None)
    gain = score if before is None else f"{format_metric(before)} → {score}"
    return [(view.metric, gain), *((name, format_flag(value)) for name, value in view.best.flags.items())]


def _legend(view: TrialView) -> Markup:
    """Build the legend of the colors and shapes that occur."""
    shapes: dict[str, list[str]] = {}
    for status in STATUSES:
        if any(trial.curve and trial.status == status for trial in view.trials):
            shapes.setdefault(SHAPES[status], []).append(STATUS_NAMES[status])
    entries = [(swatch("dot", "best"), "best")] if view.best else []
    if len(view.scores) > 1:
        ramp = [element("rect", x=i * 9, y=2, width=9, height=10, class_=f"dot r{i}") for i in range(SHADES)]
        drawing = element("svg", *ramp, width=9 * SHADES, height=14, aria_hidden="true")
        entries.append((drawing, "worst to best, by rank"))
    entries += [(swatch(shape, "r6"), ", ".join(names)) for shape, names in shapes.items()]
    return legend_of(entries)


# --- table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialTable:
    """Table of all trials, the best first.

    Args:
        heads: Names of the columns.
        numbers: Names of the columns with numbers.
        rows: For each trial the trial itself and its cells after the first as (text, class).
    """

    heads: Sequence[str]
    numbers: frozenset[str]
    rows: Sequence[tuple[Trial, Sequence[tuple[str, str]]]]

    @classmethod
    def build(cls, view: TrialView) -> TrialTable:
        """Build the table: searched flags, further flags, the metric and further metrics."""
        flags = list(dict.fromkeys([*view.space, *(name for trial in view.trials for name in trial.flags)]))
        metrics = list(dict.fromkeys(name for t in view.trials for name in t.metrics if name != view.metric))
        heads = ["trial", "status", view.metric, *flags, *metrics, "steps", "seconds"]
        heads += ["reason"] if any(trial.error for trial in view.trials) else []
        texts = {name for trial in view.trials for name, value in trial.flags.items() if not _is_number(value)}
        numbers = frozenset({view.metric, *flags, *metrics, "steps", "seconds"} - texts)
        ranked = ranked_trials(view.trials, view.metric, view.mode)
        return cls(heads, numbers, [(trial, _cells(view, trial, flags, metrics, numbers)) for trial in ranked])


def _cells(
    view: TrialView, trial: Trial, flags: Sequence[str], metrics: Sequence[str], numbers: frozenset[str]
) -> list[tuple[str, str]]:
    cells = [(STATUS_NAMES[trial.status], ""), (format_metric(view.scores.get(trial.number)), "number")]
    cells += [(format_flag(trial.flags.get(name)), "number" if name in numbers else "text") for name in flags]
    cells += [(format_metric(trial.score(name)), "number") for name in metrics]
    cells += [(f"{trial.steps:,}", "number"), (f"{trial.seconds:,.1f}", "number")]
    if trial.error:
        cells.append((shorten(" ".join(trial.error.split()), REASON_LENGTH), "reason"))
    return cells


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
