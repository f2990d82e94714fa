"""What a person looks at after a search: `report.html`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from raybge.report.charts import cut, element, mark, short
from raybge.report.page import cell, chart, command_block, duration, facts, page, section, table
from raybge.tuning.records import STATUSES, Trial, ranked
from raybge.tuning.search_space import Domain
from raybge.tuning.trial_charts import SHADES, SHAPES, View, curves, parallel, scatter, score_text
from raybge.util.atomic_write import written_aside

WIDE, NARROW = 1072, 440  # widths of a chart on a large console and on a phone, in pixels
_SAID = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "running"}


@dataclass(frozen=True)
class Search:
    """All that the report says.

    Args:
        command: the words of the search's own command.
        metric, mode: what was searched for; "max" or "min" of it is best.
        space: the domain of each searched flag.
        trials: every trial, in any order.
        best_commands: the words of each command that it takes to train the best trial again; none without a best one.
        about: further facts by name, such as the model and the scheduler.
    """

    command: Sequence[str]
    metric: str
    mode: str
    space: Mapping[str, Domain]
    trials: Sequence[Trial]
    best_commands: Sequence[Sequence[str]] = ()
    about: Mapping[str, str] = field(default_factory=dict)


def write(path: str, search: Search) -> None:
    """Write the report; a path or URI."""
    text = html(search).encode()
    with written_aside(path, "--output_dir") as out:
        out.write(text)


def html(search: Search) -> str:
    """The report as a document."""
    view = View(search.trials, search.metric, search.mode, search.space)
    title = _title(view)
    wide = curves(view, WIDE)
    return page(
        title,
        _heading(search, view, title),
        _commands(search, view),
        section(
            "Learning curves",
            f"{search.metric} while each trial trained. One that was stopped early ends where it was stopped.",
            *((_legend(view), chart(wide, curves(view, NARROW))) if wide else ()),
        ),
        section(
            "Flags and metric together",
            f"Each line is a trial: its value of every flag, and at the right the {search.metric} that it came to."
            + (" Dashed lines have none." if len(view.scores) < len(view.trials) else ""),
            chart(parallel(view, WIDE), parallel(view, NARROW)),
        ),
        section(
            "Each flag by itself",
            f"{search.metric} over the values that were tried. The best trial is circled; a short line is the median "
            "of a value with three trials or more; crosses below are trials without a metric.",
            _scatters(view),
        ),
        section("All trials", "", _table(view)),
    )


# --- heading ----------------------------------------------------------------------------------------------------------


def _title(view: View) -> str:
    if view.best is None:
        return f"No trial has measured {view.metric}"
    return f"Best {view.metric}: {score_text(view.scores[view.best.number])}, trial {view.best.number}"


def _heading(search: Search, view: View, title: str) -> str:
    counts = Counter(trial.status for trial in view.trials)
    count = f"{len(view.trials):,} trial{'s' * (len(view.trials) != 1)}"
    states = ", ".join(f"{counts[status]:,} {_SAID[status]}" for status in STATUSES if counts[status])
    better = "higher" if search.mode == "max" else "lower"
    said = [
        f"{count}: {states}" if view.trials else count,
        f"{sum(trial.steps for trial in view.trials):,} steps",
        f"{duration(sum(trial.seconds for trial in view.trials))} of training",
        f"{better} {search.metric} is better",
    ]
    parts = [
        '<p class="eyebrow">raybge.tune</p>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(" · ".join(said))}</p>',
    ]
    if view.best:
        parts.append(facts([*_gain(view), *((name, _value(value)) for name, value in view.best.flags.items())]))
    if search.about:
        parts.append('<h2 class="minor">The search</h2>' + facts(search.about.items()))
    return "\n".join(parts)


def _gain(view: View) -> list[tuple[str, str]]:
    """The best trial's metric, and the one before its first step where that was measured."""
    assert view.best is not None
    score = score_text(view.scores[view.best.number])
    before = next((value for step, value in view.best.curve if step == 0 and math.isfinite(value)), None)
    return [(view.metric, score if before is None else f"{score_text(before)} → {score}")]


def _commands(search: Search, view: View) -> str:
    parts = []
    if view.best and search.best_commands:
        blocks = "".join(map(command_block, search.best_commands))
        parts.append(f'<h2 class="minor">Trains trial {view.best.number} again</h2>{blocks}')
    if search.command:
        parts.append(f'<h2 class="minor">The command of this search</h2>{command_block(search.command)}')
    return "\n".join(parts)


# --- charts -----------------------------------------------------------------------------------------------------------


def _legend(view: View) -> str:
    """What colours and shapes mean, the ones that occur."""
    shapes: dict[str, list[str]] = {}
    for status in STATUSES:
        if any(trial.curve and trial.status == status for trial in view.trials):
            shapes.setdefault(SHAPES[status], []).append(_SAID[status])
    items = [(_swatch("dot", "best"), "best")] if view.best else []
    if len(view.scores) > 1:
        ramp = "".join(element("rect", x=i * 9, y=2, width=9, height=10, class_=f"dot r{i}") for i in range(SHADES))
        items.append((element("svg", ramp, width=9 * SHADES, height=14), "worst to best, by rank"))
    items += [(_swatch(shape, "r6"), ", ".join(names)) for shape, names in shapes.items()]
    inside = "".join(f"<li>{drawing}{escape(name)}</li>" for drawing, name in items)
    return f'<ul class="legend">{inside}</ul>'


def _swatch(shape: str, class_: str) -> str:
    return element("svg", mark(shape, 8, 7, class_), width=16, height=14)


def _scatters(view: View) -> str:
    drawn = [scatter(view, name) for name in view.space]
    inside = "".join(f'<div class="chart">{each}</div>' for each in drawn if each)
    return f'<div class="small-charts">{inside}</div>' if inside else ""


# --- table ------------------------------------------------------------------------------------------------------------


def _table(view: View) -> str:
    names = list(dict.fromkeys([*view.space, *(name for trial in view.trials for name in trial.flags)]))
    others = list(dict.fromkeys(name for t in view.trials for name in t.metrics if name != view.metric))
    heads = ["trial", "status", view.metric, *names, *others, "steps", "seconds"]
    heads += ["reason"] if any(trial.error for trial in view.trials) else []
    texts = {name for trial in view.trials for name, value in trial.flags.items() if not _is_number(value)}
    numbers = {view.metric, *names, *others, "steps", "seconds"} - texts
    rows = [_row(view, trial, names, others, numbers) for trial in ranked(view.trials, view.metric, view.mode)]
    return table(heads, rows, numbers)


def _row(view: View, trial: Trial, names: Sequence[str], others: Sequence[str], numbers: Container[str]) -> str:
    score = view.scores.get(trial.number)
    cells = [
        f'<td class="id"><span class="swatch {view.shade(trial)}"></span>{trial.number}</td>',
        cell(_SAID[trial.status]),
        cell("–" if score is None else score_text(score), "number"),
    ]
    for name in names:
        cells.append(cell(_value(trial.flags.get(name)), "number" if name in numbers else "text"))
    others_found = (trial.score(name) for name in others)
    cells += [cell("–" if value is None else score_text(value), "number") for value in others_found]
    cells += [cell(f"{trial.steps:,}", "number"), cell(f"{trial.seconds:,.1f}", "number")]
    if trial.error:
        cells.append(cell(cut(" ".join(trial.error.split()), 240), "reason"))
    best = ' class="best"' if trial is view.best else ""
    return f'<tr data-t="{trial.number}"{best}>{"".join(cells)}</tr>'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(value: Any) -> str:
    """A flag's value: an empty text and one that was not given are seen too."""
    return "–" if value is None else short(value) if value != "" else '""'
