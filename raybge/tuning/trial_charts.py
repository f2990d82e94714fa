"""Charts of a search: learning curves, parallel coordinates, the metric over each flag.

A trial has the same color in all of them, by its rank: the worst is pale, and the best trial has a color of its own.
Ranks and not values, so that one diverged run does not leave all others with the same color; for the same reason such
a run does not stretch the metric's axis but is clamped to its end.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from markupsafe import Markup

from raybge.report.charts import (
    CHARACTER,
    LINE,
    Frame,
    bottom_axis,
    clipped,
    left_axis,
    line,
    mark,
    rotated_height,
    svg,
    text_label,
)
from raybge.report.scales import Axis, Categories, Scale, nonempty_range, spread_labels, tick_range
from raybge.report.text import format_metric, format_value, shorten
from raybge.tuning.records import Trial, best_trial, ranked_trials
from raybge.tuning.search_space import Domain

SHADES = 9  # classes r0 to r8 of page.css
TICKS = 6  # at most, on the metric's axis
FEW = 12  # trials that are distinguishable one by one: their curves are labeled with their numbers
SHAPES = {"finished": "dot", "stopped": "ring", "failed": "cross", "running": "ring"}
STATUS_NAMES = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "running"}


@dataclass(frozen=True)
class TrialView:
    """Trials of a search with what its charts derive from them.

    Args:
        trials: The trials.
        metric: The metric that is optimized.
        mode: "max" or "min".
        space: The domain of each searched flag.
    """

    trials: Sequence[Trial]
    metric: str
    mode: str
    space: Mapping[str, Domain]

    @cached_property
    def best(self) -> Trial | None:
        """The best trial; None if no trial has the metric."""
        return best_trial(self.trials, self.metric, self.mode)

    @cached_property
    def order(self) -> list[Trial]:
        """The trials from worst to best: the best one is drawn last, on top."""
        others = [t for t in reversed(ranked_trials(self.trials, self.metric, self.mode)) if t is not self.best]
        return others + ([self.best] if self.best else [])

    @cached_property
    def scores(self) -> dict[int, float]:
        """The metric by trial number, of the trials that have it."""
        scores = ((t.number, t.score(self.metric)) for t in self.trials)
        return {number: score for number, score in scores if score is not None}

    def shade(self, trial: Trial) -> str:
        """Return the class of a trial's color."""
        if trial is self.best:
            return "best"
        if trial.number not in self.scores:
            return "none"
        distinct = sorted(set(self.scores.values()), reverse=self.mode == "min")
        share = distinct.index(self.scores[trial.number]) / (len(distinct) - 1) if len(distinct) > 1 else 1
        return f"r{round(share * (SHADES - 1))}"

    def tooltip(self, trial: Trial) -> str:
        """Describe a trial: number, status, metric and flags."""
        score = self.scores.get(trial.number)
        first = f"trial {trial.number}, {STATUS_NAMES[trial.status]}" + (", the best" if trial is self.best else "")
        metric = f"{self.metric} {format_metric(score)}" if score is not None else f"no {self.metric}"
        return "\n".join([first, metric, *(f"{name} {format_value(value)}" for name, value in trial.flags.items())])

    @cached_property
    def span(self) -> tuple[float, float]:
        """The range of the metric's axis."""
        return tick_range(*focus(list(self.scores.values()), self.mode), TICKS)


def focus(scores: Sequence[float], mode: str) -> tuple[float, float]:
    """Return the range of the scores without those worse than the others by three interquartile ranges.

    Args:
        scores: The scores.
        mode: "max" or "min": which end is the worse one.

    Returns:
        The lowest and highest value of the axis.
    """
    lo, hi = min(scores), max(scores)
    if len(scores) < 4:
        return lo, hi
    first, _, third = statistics.quantiles(scores, n=4, method="inclusive")
    limit = 3 * (third - first)
    if not limit:
        return lo, hi
    return (max(lo, first - limit), hi) if mode == "max" else (lo, min(hi, third + limit))


def flag_axis(view: TrialView, name: str, start: float, end: float) -> Axis:
    """Return the axis of a flag: its domain, widened to the values of trials outside of it."""
    domain = view.space[name]
    values = [trial.flags[name] for trial in view.trials if name in trial.flags]
    if domain.categorical:
        return Categories(tuple(dict.fromkeys([*domain.arguments, *values])), start, end)
    last = domain.hi - 1 if domain.whole else domain.hi
    lo, hi = min([domain.lo, *values]), max([last, *values])
    log = domain.log and lo > 0
    if lo == hi:
        lo, hi = (lo / 2, hi * 2) if log else nonempty_range(lo, hi)
    return Scale(lo, hi, start, end, log=log, whole=domain.whole)


def axis_positions(view: TrialView, name: str, axis: Axis) -> dict[int, float]:
    """Return the position of each trial that has the flag; trials of the same category are placed side by side."""
    having = [trial for trial in view.order if name in trial.flags]
    if isinstance(axis, Scale):
        return {trial.number: axis(trial.flags[name]) for trial in having}
    groups = defaultdict(list)
    for trial in sorted(having, key=lambda trial: trial.number):
        groups[trial.flags[name]].append(trial.number)
    positions = {}
    for value, numbers in groups.items():
        step = min(10.0, 0.7 * axis.band / len(numbers))
        for i, number in enumerate(numbers):
            positions[number] = axis(value) + (i - (len(numbers) - 1) / 2) * step
    return positions


# --- learning curves --------------------------------------------------------------------------------------------------


def learning_curves(view: TrialView, width: float) -> Markup:
    """Draw the metric over the steps of every trial; empty if nothing was measured."""
    curves = {trial.number: points for trial in view.order if (points := _finite(trial.curve))}
    if not curves:
        return Markup("")
    few = len(curves) <= FEW
    height = 420.0 if width > 700 else 330.0
    # Labels at the right: number and metric of the best trial, numbers of others if there are few.
    frame = Frame(62, 40, width - 20 - 8 * len(_best_label(view)), height - 52)
    last = max(points[-1][0] for points in curves.values())
    x = Scale(0, last or 1, frame.left, frame.right, whole=True)
    y = Scale(*_curve_range(view, curves), frame.bottom, frame.top)
    lines, ends = [], []
    for trial in view.order:
        if trial.number not in curves:
            continue
        path = [(x(step), y(value)) for step, value in curves[trial.number]]
        class_ = view.shade(trial)
        lines.append(line(path, f"curve {class_}{_density(curves)}", view.tooltip(trial), data_t=trial.number))
        if few or (trial is view.best and len(path) <= FEW):
            lines += [mark("dot", px, py, f"{class_} tiny", data_t=trial.number) for px, py in path[:-1]]
        ends.append(mark(SHAPES[trial.status], *path[-1], class_, view.tooltip(trial), data_t=trial.number))
    max_ticks = int((frame.right - frame.left) / 55)
    axes = bottom_axis(x, frame, "training step", max_ticks) + left_axis(y, frame, view.metric, TICKS)
    labels = _curve_labels(view, curves, x, y, frame)
    label = f"{view.metric} over training steps of {len(curves)} trials"
    return svg(width, height, label, axes, clipped(frame.padded(6), *lines, *ends), *labels)


def _density(trials: Sized) -> str:
    """Return the class that thins lines if there are many."""
    return " many" if len(trials) > 60 else " some" if len(trials) > FEW else ""


def _best_label(view: TrialView) -> str:
    return f"trial {view.best.number}: {format_metric(view.scores[view.best.number])}" if view.best else ""


def _finite(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, value) for step, value in curve if math.isfinite(value)]


def _curve_range(view: TrialView, curves: Mapping[int, Sequence[tuple[int, float]]]) -> tuple[float, float]:
    """Return the range of the curves' ends and of their median start, since most start from the same model."""
    ends = [points[-1][1] for points in curves.values()]
    begin = statistics.median(points[0][1] for points in curves.values())
    lo, hi = focus(ends, view.mode)
    peak = (max if view.mode == "max" else min)(value for points in curves.values() for _, value in points)
    return tick_range(min(lo, begin, peak), max(hi, begin, peak), TICKS)


def _curve_labels(
    view: TrialView, curves: Mapping[int, Sequence[tuple[int, float]]], x: Scale, y: Scale, frame: Frame
) -> list[Markup]:
    """Label the ends of the curves if they are few, and always the best one, with its metric."""
    few = len(curves) <= FEW
    ended = defaultdict(list)
    for trial in view.order:
        if trial.number in curves and (few or trial is view.best):
            ended[curves[trial.number][-1][0]].append(trial)
    labels = []
    for step, trials in ended.items():
        at_end = x(step) > frame.right - 40
        left = frame.right + 12 if at_end else x(step) + 9
        positions = spread_labels([y(curves[trial.number][-1][1]) for trial in trials], 14, frame.top, frame.bottom)
        for trial, position in zip(trials, positions, strict=True):
            text = f"trial {trial.number}" if at_end else str(trial.number)
            text = _best_label(view) if trial is view.best else text
            labels.append(text_label(left, position + 4, text, f"end {view.shade(trial)}", "start"))
    return labels


# --- parallel coordinates ---------------------------------------------------------------------------------------------


def parallel_coordinates(view: TrialView, width: float) -> Markup:
    """Draw each trial as a line across one axis per flag and the metric's axis; dashed without a metric."""
    if not view.scores or not view.space:
        return Markup("")
    names = list(view.space)
    full = max(width, 150 + 90 * len(names))
    label_length = min(max(int((full - 160) / len(names) / CHARACTER) - 2, 6), 20)
    heads = [wrap_name(name, label_length) for name in (*names, view.metric)]
    top = 22 + LINE * max(map(len, heads))
    frame = Frame(84, top, full - 76, top + (330 if width > 700 else 290))
    gap = (frame.right - frame.left) / len(names)
    columns = [frame.left + i * gap for i in range(len(names) + 1)]
    axes: list[Axis] = [flag_axis(view, name, frame.bottom, frame.top) for name in names]
    metric = Scale(*view.span, frame.bottom, frame.top)
    positions = [axis_positions(view, name, axis) for name, axis in zip(names, axes, strict=True)]
    lines = []
    for trial in view.order:
        if not all(trial.number in column for column in positions):
            continue
        points = [(x, column[trial.number]) for x, column in zip(columns, positions, strict=False)]
        score = view.scores.get(trial.number)
        if score is not None:
            points.append((columns[-1], metric(score)))
        class_ = f"path {view.shade(trial)}{_density(view.trials)}"
        lines.append(line(points, class_, view.tooltip(trial), data_t=trial.number))
        ends = points if trial is view.best else points[-1:]
        lines += [
            mark("dot", x, y, f"{view.shade(trial)} tiny", data_t=trial.number) for x, y in ends if score is not None
        ]
    drawn_axes = [
        _vertical_axis(axis, x, head, label_length)
        for axis, x, head in zip([*axes, metric], columns, heads, strict=True)
    ]
    label = f"{len(view.trials)} trials as lines across {', '.join(names)} and {view.metric}"
    return svg(full, frame.bottom + 24, label, *lines, *drawn_axes, scrolls=full > width)


def _vertical_axis(axis: Axis, x: float, head: Sequence[str], label_length: int) -> Markup:
    """Draw a vertical axis: its name in lines on top, labels of at most `label_length` characters at its right."""
    top, bottom = min(axis.start, axis.end), max(axis.start, axis.end)
    ticks = axis.ticks(int((bottom - top) / LINE), label_length) if isinstance(axis, Categories) else axis.ticks(TICKS)
    elements = [line([(x, top), (x, bottom)], "axis")]
    for tick in ticks:
        elements.append(line([(x, tick.at), (x + (5 if tick.label else 3), tick.at)], "axis"))
        if tick.label:
            # Lines meet in the middle of a category, so its name is placed slightly above.
            elements.append(
                text_label(
                    x + 8,
                    tick.at + (-5 if isinstance(axis, Categories) else 4),
                    tick.label,
                    "tick halo",
                    "start",
                    tick.full,
                )
            )
    elements += [text_label(x, top - 14 - LINE * (len(head) - 1 - i), row, "name") for i, row in enumerate(head)]
    return Markup("").join(elements)


def wrap_name(name: str, length: int) -> list[str]:
    """Break a flag's name after underscores into at most three lines of about `length` characters."""
    rows = [""]
    for part in name.replace("_", "_ ").split(" "):
        if rows[-1] and len(rows[-1]) + len(part) > length and len(rows) < 3:
            rows.append("")
        rows[-1] += part
    return [shorten(row, length + 4) for row in rows]


# --- the metric over a flag -------------------------------------------------------------------------------------------


def scatter(view: TrialView, name: str) -> Markup:
    """Draw the metric of every trial over its value of one flag; trials without a metric as crosses at the bottom."""
    if not view.scores:
        return Markup("")
    width = 340.0
    frame = Frame(54, 36, width - 14, 226)
    axis = flag_axis(view, name, frame.left + 8, frame.right - 8)
    metric = Scale(*view.span, frame.bottom - 22, frame.top)
    below = rotated_height(axis.ticks(20)) if isinstance(axis, Categories) else 17
    positions = axis_positions(view, name, axis)
    marks = []
    for trial in view.order:
        if trial.number not in positions:
            continue
        score = view.scores.get(trial.number)
        shape, y = ("cross", frame.bottom - 8) if score is None else (_shape(trial, score, metric), metric(score))
        x = positions[trial.number]
        if trial is view.best:
            marks.append(mark("ring", x, y, "best halo"))
        marks.append(mark(shape, x, y, view.shade(trial), view.tooltip(trial), data_t=trial.number))
    axes = bottom_axis(axis, frame, name, 5) + left_axis(metric, frame, view.metric, TICKS)
    return svg(
        width,
        frame.bottom + below + 30,
        f"{view.metric} over {name}",
        axes,
        *_medians(view, name, axis, metric),
        *marks,
    )


def _shape(trial: Trial, score: float, metric: Scale) -> str:
    if metric.lo <= score <= metric.hi:
        return SHAPES[trial.status] if trial.status != "failed" else "dot"
    return "down" if score < metric.lo else "up"


def _medians(view: TrialView, name: str, axis: Axis, metric: Scale) -> list[Markup]:
    """Draw the median of each category with three trials or more as a short line."""
    if not isinstance(axis, Categories):
        return []
    groups: dict[Any, list[float]] = defaultdict(list)
    for trial in view.trials:
        if trial.number in view.scores and name in trial.flags:
            groups[trial.flags[name]].append(view.scores[trial.number])
    half = 0.42 * axis.band
    return [
        line([(axis(value) - half, y), (axis(value) + half, y)], "middle", f"median {format_metric(middle)}")
        for value, scores in groups.items()
        if len(scores) >= 3
        for middle in [statistics.median(scores)]
        for y in [metric(middle)]
    ]
