"""The charts of a search: learning curves, parallel coordinates, the metric over each flag.

In all of them a trial has one colour, by its rank: what is worst is pale, and the best trial stands out in a colour of
its own. Ranks and not values, so that one run that went astray does not leave all others with the same colour; for the
same reason such a run does not stretch the metric's axis but lies at its end.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raybge.report.charts import (
    CHARACTER,
    LINE,
    Axis,
    Categories,
    Frame,
    Scale,
    apart,
    askew_height,
    bottom_axis,
    clipped,
    cut,
    left_axis,
    line,
    mark,
    rounded_out,
    short,
    spread,
    svg,
    words,
)
from raybge.tuning.records import Trial, best, ranked
from raybge.tuning.search_space import Domain

SHADES = 9  # r0 to r8 in page.css
TICKS = 6  # at most, on an axis of the metric
FEW = 12  # trials that can be told apart one by one: their numbers stand at their curves
SHAPES = {"finished": "dot", "stopped": "ring", "failed": "cross", "running": "ring"}
_ENDS = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "still running"}


@dataclass(frozen=True)
class View:
    """The trials of a search as charts see them; `mode` says whether "max" or "min" of the metric is best."""

    trials: Sequence[Trial]
    metric: str
    mode: str
    space: Mapping[str, Domain]

    @cached_property
    def best(self) -> Trial | None:
        return best(self.trials, self.metric, self.mode)

    @cached_property
    def order(self) -> list[Trial]:
        """Worst to best, the best one last: what is drawn last lies on top."""
        others = [t for t in reversed(ranked(self.trials, self.metric, self.mode)) if t is not self.best]
        return others + ([self.best] if self.best else [])

    @cached_property
    def scores(self) -> dict[int, float]:
        """The metric by number of the trials that have it."""
        found = ((t.number, t.score(self.metric)) for t in self.trials)
        return {number: score for number, score in found if score is not None}

    def shade(self, trial: Trial) -> str:
        """The class that gives a trial its colour."""
        if trial is self.best:
            return "best"
        if trial.number not in self.scores:
            return "none"
        distinct = sorted(set(self.scores.values()), reverse=self.mode == "min")
        share = distinct.index(self.scores[trial.number]) / (len(distinct) - 1) if len(distinct) > 1 else 1
        return f"r{round(share * (SHADES - 1))}"

    def tell(self, trial: Trial) -> str:
        """What a trial is, for its tooltip."""
        score = self.scores.get(trial.number)
        first = f"trial {trial.number}, {_ENDS[trial.status]}" + (", the best" if trial is self.best else "")
        measured = f"{self.metric} {score_text(score)}" if score is not None else f"no {self.metric}"
        return "\n".join([first, measured, *(f"{name} {short(value)}" for name, value in trial.flags.items())])

    @cached_property
    def span(self) -> tuple[float, float]:
        """Where the metric's axis begins and ends."""
        return rounded_out(*focus(list(self.scores.values()), self.mode), TICKS)


def score_text(score: float) -> str:
    """A metric's value in words."""
    return f"{score:.4f}" if 1e-3 <= abs(score) < 1e4 or not score else short(float(score))


def focus(scores: Sequence[float], mode: str) -> tuple[float, float]:
    """From worst to best, leaving out what is worse than the others by far (three times their middle half)."""
    lo, hi = min(scores), max(scores)
    if len(scores) < 4:
        return lo, hi
    first, _, third = statistics.quantiles(scores, n=4, method="inclusive")
    far = 3 * (third - first)
    if not far:
        return lo, hi
    return (max(lo, first - far), hi) if mode == "max" else (lo, min(hi, third + far))


def axis_of(view: View, name: str, start: float, end: float) -> Axis:
    """The axis of a flag: what is searched, and what trials have beyond it."""
    domain = view.space[name]
    values = [trial.flags[name] for trial in view.trials if name in trial.flags]
    if domain.categorical:
        return Categories(tuple(dict.fromkeys([*domain.arguments, *values])), start, end)
    last = domain.hi - 1 if domain.whole else domain.hi
    lo, hi = min([domain.lo, *values]), max([last, *values])
    log = domain.log and lo > 0
    if lo == hi:
        lo, hi = (lo / 2, hi * 2) if log else apart(lo, hi)
    return Scale(lo, hi, start, end, log=log, whole=domain.whole)


def places(view: View, name: str, axis: Axis) -> dict[int, float]:
    """Where each trial that has the flag lies on its axis; trials with one category lie side by side."""
    having = [trial for trial in view.order if name in trial.flags]
    if isinstance(axis, Scale):
        return {trial.number: axis(trial.flags[name]) for trial in having}
    groups = defaultdict(list)
    for trial in sorted(having, key=lambda trial: trial.number):
        groups[trial.flags[name]].append(trial.number)
    found = {}
    for value, numbers in groups.items():
        step = min(10.0, 0.7 * axis.band / len(numbers))
        for i, number in enumerate(numbers):
            found[number] = axis(value) + (i - (len(numbers) - 1) / 2) * step
    return found


# --- learning curves --------------------------------------------------------------------------------------------------


def curves(view: View, width: float) -> str:
    """The metric over the steps of every trial."""
    drawn = {trial.number: points for trial in view.order if (points := _finite(trial.curve))}
    if not drawn:
        return ""
    few = len(drawn) <= FEW
    height = 420.0 if width > 700 else 330.0
    # The best one's number and metric stand at the right; the numbers of few others too.
    frame = Frame(62, 40, width - 20 - 8 * len(_best_label(view)), height - 52)
    last = max(points[-1][0] for points in drawn.values())
    x = Scale(0, last or 1, frame.left, frame.right, whole=True)
    y = Scale(*_curve_span(view, drawn), frame.bottom, frame.top)
    lines, ends = [], []
    for trial in view.order:
        if trial.number not in drawn:
            continue
        path = [(x(step), y(value)) for step, value in drawn[trial.number]]
        class_ = view.shade(trial)
        lines.append(line(path, f"curve {class_}{crowd(drawn)}", view.tell(trial), data_t=trial.number))
        if few or (trial is view.best and len(path) <= FEW):
            lines += [mark("dot", px, py, f"{class_} tiny", data_t=trial.number) for px, py in path[:-1]]
        ends.append(mark(SHAPES[trial.status], *path[-1], class_, view.tell(trial), data_t=trial.number))
    most = int((frame.right - frame.left) / 55)
    axes = bottom_axis(x, frame, "training step", most) + left_axis(y, frame, view.metric, TICKS)
    # The frame's own edge cuts half of a line that lies on it.
    room = Frame(frame.left - 6, frame.top - 6, frame.right + 6, frame.bottom + 6)
    labels = _curve_labels(view, drawn, x, y, frame, few)
    label = f"{view.metric} over training steps of {len(drawn)} trials"
    return svg(width, height, label, axes, clipped(room, *lines, *ends), labels)


def crowd(trials: Sized) -> str:
    """The class that makes lines thin where there are many."""
    return " many" if len(trials) > 60 else " some" if len(trials) > FEW else ""


def _best_label(view: View) -> str:
    return f"trial {view.best.number}: {score_text(view.scores[view.best.number])}" if view.best else ""


def _finite(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, value) for step, value in curve if math.isfinite(value)]


def _curve_span(view: View, drawn: Mapping[int, Sequence[tuple[int, float]]]) -> tuple[float, float]:
    """Where curves end, and where the middle one of them begins: most begin with the same model."""
    ends = [points[-1][1] for points in drawn.values()]
    begin = statistics.median(points[0][1] for points in drawn.values())
    lo, hi = focus(ends, view.mode)
    peak = (max if view.mode == "max" else min)(value for points in drawn.values() for _, value in points)
    return rounded_out(min(lo, begin, peak), max(hi, begin, peak), TICKS)


def _curve_labels(
    view: View, drawn: Mapping[int, Sequence[tuple[int, float]]], x: Scale, y: Scale, frame: Frame, few: bool
) -> str:
    """Numbers at the ends of few curves, and at the best one's its metric too."""
    ended = defaultdict(list)
    for trial in view.order:
        if trial.number in drawn and (few or trial is view.best):
            ended[drawn[trial.number][-1][0]].append(trial)
    written = []
    for step, trials in ended.items():
        at_end = x(step) > frame.right - 40
        left = frame.right + 12 if at_end else x(step) + 9
        moved = spread([y(drawn[trial.number][-1][1]) for trial in trials], 14, frame.top, frame.bottom)
        for trial, place in zip(trials, moved, strict=True):
            text = f"trial {trial.number}" if at_end else str(trial.number)
            text = _best_label(view) if trial is view.best else text
            written.append(words(left, place + 4, text, f"end {view.shade(trial)}", "start"))
    return "".join(written)


# --- parallel coordinates ---------------------------------------------------------------------------------------------


def parallel(view: View, width: float) -> str:
    """Each trial as a line across one axis a flag and the metric's at the right; dashed where it has no metric."""
    if not view.scores or not view.space:
        return ""
    names = list(view.space)
    full = max(width, 150 + 90 * len(names))
    fit = min(max(int((full - 160) / len(names) / CHARACTER) - 2, 6), 20)
    heads = [wrapped(name, fit) for name in (*names, view.metric)]
    top = 22 + LINE * max(map(len, heads))
    frame = Frame(84, top, full - 76, top + (330 if width > 700 else 290))
    gap = (frame.right - frame.left) / len(names)
    at = [frame.left + i * gap for i in range(len(names) + 1)]
    axes: list[Axis] = [axis_of(view, name, frame.bottom, frame.top) for name in names]
    metric = Scale(*view.span, frame.bottom, frame.top)
    found = [places(view, name, axis) for name, axis in zip(names, axes, strict=True)]
    lines = []
    for trial in view.order:
        if not all(trial.number in place for place in found):
            continue
        points = [(x, place[trial.number]) for x, place in zip(at, found, strict=False)]
        score = view.scores.get(trial.number)
        if score is not None:
            points.append((at[-1], metric(score)))
        class_ = f"path {view.shade(trial)}{crowd(view.trials)}"
        lines.append(line(points, class_, view.tell(trial), data_t=trial.number))
        ends = points if trial is view.best else points[-1:]
        lines += [
            mark("dot", x, y, f"{view.shade(trial)} tiny", data_t=trial.number) for x, y in ends if score is not None
        ]
    drawn = [_upright(axis, x, head, fit) for axis, x, head in zip([*axes, metric], at, heads, strict=True)]
    label = f"{len(view.trials)} trials as lines across {', '.join(names)} and {view.metric}"
    return svg(full, frame.bottom + 24, label, *lines, *drawn, scrolls=full > width)


def _upright(axis: Axis, x: float, head: Sequence[str], fit: int) -> str:
    """An axis that stands, with its name in lines on top and labels of at most `fit` characters at its right."""
    top, bottom = min(axis.start, axis.end), max(axis.start, axis.end)
    listed = isinstance(axis, Categories)
    ticks = axis.ticks(int((bottom - top) / LINE), fit) if isinstance(axis, Categories) else axis.ticks(TICKS)
    drawn = [line([(x, top), (x, bottom)], "axis")]
    for tick in ticks:
        drawn.append(line([(x, tick.at), (x + (5 if tick.label else 3), tick.at)], "axis"))
        if tick.label:
            # Lines meet in the middle of a category: its name stands a little above.
            drawn.append(words(x + 8, tick.at + (-5 if listed else 4), tick.label, "tick halo", "start", tick.full))
    drawn += [words(x, top - 14 - LINE * (len(head) - 1 - i), row, "name") for i, row in enumerate(head)]
    return "".join(drawn)


def wrapped(name: str, most: int) -> list[str]:
    """A flag's name in at most three lines of about `most` characters, broken after underscores."""
    rows = [""]
    for part in name.replace("_", "_ ").split(" "):
        if rows[-1] and len(rows[-1]) + len(part) > most and len(rows) < 3:
            rows.append("")
        rows[-1] += part
    return [cut(row, most + 4) for row in rows]


# --- the metric over a flag -------------------------------------------------------------------------------------------


def scatter(view: View, name: str) -> str:
    """The metric of every trial over its value of one flag; failed trials as crosses below."""
    if not view.scores:
        return ""
    width = 340.0
    frame = Frame(54, 36, width - 14, 226)
    axis = axis_of(view, name, frame.left + 8, frame.right - 8)
    metric = Scale(*view.span, frame.bottom - 22, frame.top)
    below = askew_height(axis.ticks(20)) if isinstance(axis, Categories) else 17
    found = places(view, name, axis)
    marks = []
    for trial in view.order:
        if trial.number not in found:
            continue
        score = view.scores.get(trial.number)
        shape, y = ("cross", frame.bottom - 8) if score is None else (_shape(trial, score, metric), metric(score))
        x = found[trial.number]
        if trial is view.best:
            marks.append(mark("ring", x, y, "best halo"))
        marks.append(mark(shape, x, y, view.shade(trial), view.tell(trial), data_t=trial.number))
    axes = bottom_axis(axis, frame, name, 5) + left_axis(metric, frame, view.metric, TICKS)
    return svg(
        width,
        frame.bottom + below + 30,
        f"{view.metric} over {name}",
        axes,
        *_middles(view, name, axis, metric),
        *marks,
    )


def _shape(trial: Trial, score: float, metric: Scale) -> str:
    if metric.lo <= score <= metric.hi:
        return SHAPES[trial.status] if trial.status != "failed" else "dot"
    return "down" if score < metric.lo else "up"


def _middles(view: View, name: str, axis: Axis, metric: Scale) -> list[str]:
    """The median of each category that has three trials or more, as a short line."""
    if not isinstance(axis, Categories):
        return []
    groups: dict[Any, list[float]] = defaultdict(list)
    for trial in view.trials:
        if trial.number in view.scores and name in trial.flags:
            groups[trial.flags[name]].append(view.scores[trial.number])
    half = 0.42 * axis.band
    return [
        line([(axis(value) - half, y), (axis(value) + half, y)], "middle", f"median {score_text(middle)}")
        for value, scores in groups.items()
        if len(scores) >= 3
        for middle in [statistics.median(scores)]
        for y in [metric(middle)]
    ]
