"""Charts of many numbers: curves over the steps of a run, and histograms.

Each chart function returns `Markup`, empty if there is nothing to draw.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from raybge.report.charts import Frame, bottom_axis, clipped, element, left_axis, line, mark, svg, swatch
from raybge.report.scales import Scale, tick_range, tick_step
from raybge.report.text import format_value

WIDE, NARROW, SMALL = 1072.0, 440.0, 380.0  # widths in pixels: large screen, phone, one of several in a row
MAX_POINTS = 400  # of a curve
MAX_DOTS = 60  # points of a curve that are drawn as dots; those of longer curves appear under the pointer
MAX_HOVER = 120  # points of a longer curve that have a tooltip, evenly spaced
MAX_BARS = 60  # of a histogram
TICKS = 6
Point = tuple[float, float]


def chart(wide: Markup, narrow: Markup | None = None) -> Markup:
    """Wrap a drawing; small screens show the narrow version, if there is one, so that texts stay legible."""
    if not wide:
        return Markup("")
    if not narrow:
        return element("div", wide, class_="chart")
    return element("div", wide, class_="chart wide") + element("div", narrow, class_="chart narrow")


# --- curves -----------------------------------------------------------------------------------------------------------


def curve(points: Sequence[Point], name: str, x_name: str = "training step", *, trend: bool = False) -> Markup:
    """Draw a value over the steps, for wide and narrow screens; see `draw_curve`."""
    wide, narrow = (draw_curve(points, name, x_name, width, trend=trend) for width in (WIDE, NARROW))
    return chart(wide, narrow)


def small_curve(points: Sequence[Point], name: str, x_name: str = "training step", *, steady: bool = False) -> Markup:
    """Draw a value over the steps in a small chart; see `draw_curve`."""
    return chart(draw_curve(points, name, x_name, SMALL, steady=steady))


def draw_curve(
    points: Sequence[Point], name: str, x_name: str, width: float, *, trend: bool = False, steady: bool = False
) -> Markup:
    """Draw a curve with the value of each point as its tooltip; more than MAX_POINTS points are averaged.

    Args:
        points: (step, value) pairs, ascending; those that are not finite are omitted.
        name: Name of the value.
        x_name: Name of the step.
        width: Width in pixels.
        trend: Draw the values pale and their moving mean on top.
        steady: The value is about constant except for outliers, such as the first step's time: outliers are clamped to
            the axis's end instead of stretching it.

    Returns:
        The drawing; empty if no point is finite.
    """
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return Markup("")
    means = bucket_means(finite, MAX_POINTS)
    height = 250.0 if width == SMALL else 340.0 if width == WIDE else 290.0
    frame = Frame(66, 34, width - 22, height - 50)
    first, last = means[0][0], means[-1][0]
    x = Scale(first, last if last > first else first + 1, frame.left, frame.right, whole=True)
    y = Scale(*_value_range([value for _, value in means], steady), frame.bottom, frame.top)
    title = f"{name}: from {format_value(means[0][1])} to {format_value(means[-1][1])}"
    path = [(x(a), y(b)) for a, b in means]
    drawing = [mark("dot", *path[0], "r6", title)] if len(path) == 1 else [line(path, "curve r6", title)]
    if trend and len(means) > 20:
        drawing = [line(path, "curve r1", title), line([(x(a), y(b)) for a, b in smoothed(means)], "curve trend r7")]
    if len(path) > 1:
        drawing += _tooltips(means, path, name, x_name)
    axes = bottom_axis(x, frame, x_name, int((frame.right - frame.left) / 62)) + left_axis(y, frame, name, TICKS)
    return svg(width, height, f"{title} over {len(finite):,} points", axes, clipped(frame.padded(5), *drawing))


def _tooltips(means: Sequence[Point], path: Sequence[Point], name: str, x_name: str) -> list[Markup]:
    """Mark points of a curve, with their values as tooltips."""
    class_ = "r6 tiny" if len(path) <= MAX_DOTS else "r7 hidden"
    every = math.ceil(len(path) / MAX_HOVER)
    return [
        mark("dot", *path[i], class_, f"{x_name} {means[i][0]:,.0f}: {name} {format_value(means[i][1])}")
        for i in range(0, len(path), every)
    ]


def bucket_means(points: Sequence[Point], max_points: int) -> list[Point]:
    """Return at most `max_points` points: the means of consecutive buckets of equal size."""
    size = math.ceil(len(points) / max_points)
    if size <= 1:
        return list(points)
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [(statistics.fmean(a for a, _ in part), statistics.fmean(b for _, b in part)) for part in parts]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return the centered moving mean: a twentieth of all points on either side, fewer at the ends."""
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    radius = max(1, len(points) // 20)
    means = []
    for i, (at, _) in enumerate(points):
        around = min(radius, i, len(points) - 1 - i)
        means.append((at, (sums[i + around + 1] - sums[i - around]) / (2 * around + 1)))
    return means


def _value_range(values: Sequence[float], steady: bool) -> tuple[float, float]:
    lo, hi = min(values), max(values)
    if steady and len(values) >= 4:
        first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
        limit = max(4 * (third - first), 0.1 * abs(middle))
        lo, hi = max(lo, first - limit), min(hi, third + limit)
    return tick_range(0 if steady and lo > 0 else lo, hi, TICKS)


# --- histograms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bars:
    """One group of a histogram: number of values in [i, i + 1) times the bin width, by i. `class_` is its color."""

    name: str
    counts: Mapping[int, int]
    class_: str

    @property
    def total(self) -> int:
        """Number of values."""
        return sum(self.counts.values())


def binned(values: Iterable[float], width: float) -> Counter[int]:
    """Count values per bin for `Bars`; values that are not finite are omitted."""
    return Counter(math.floor(value / width) for value in values if math.isfinite(value))


def bin_width(values: Iterable[float]) -> float:
    """Return a round bin width that gives few bins: a small sample in many bins is ragged."""
    finite = [value for value in values if math.isfinite(value)]
    lo, hi = (min(finite), max(finite)) if finite else (0.0, 1.0)
    return tick_step(lo, hi if hi > lo else lo + (abs(lo) or 1.0), MAX_BARS // 2 - 1)


def histogram(
    groups: Sequence[Bars], bin_width: float, name: str, *, small: bool = False, like: Sequence[Bars] = ()
) -> Markup:
    """Draw each group's shares over the value, the groups on top of one another.

    Args:
        groups: The groups.
        bin_width: Width of a bin; with more than MAX_BARS bins, neighbors are merged.
        name: Name of the values.
        small: Draw a small chart, for a row of several.
        like: Groups of the neighboring charts, which shall have the same axes.

    Returns:
        The chart; empty if all groups are empty.
    """
    if not any(group.total for group in groups):
        return Markup("")
    if small:
        return chart(draw_histogram(groups, bin_width, name, SMALL, like))
    wide, narrow = (draw_histogram(groups, bin_width, name, width, like) for width in (WIDE, NARROW))
    return chart(wide, narrow)


def draw_histogram(
    groups: Sequence[Bars], bin_width: float, name: str, width: float, like: Sequence[Bars] = ()
) -> Markup:
    """Draw a histogram `width` pixels wide; see `histogram`."""
    numbers = [number for group in (*groups, *like) for number in group.counts]
    merge = math.ceil((max(numbers) - min(numbers) + 1) / MAX_BARS)
    merged = [_merge_bins(group, merge) for group in groups]
    bin_width *= merge
    numbers = [number // merge for number in numbers]
    lo, hi = min(numbers), max(numbers) + 1
    height = 250.0 if width == SMALL else 300.0
    frame = Frame(60, 34, width - 22, height - 50)
    x = Scale(lo * bin_width, hi * bin_width, frame.left, frame.right)
    all_groups = [*merged, *(_merge_bins(group, merge) for group in like)]
    shares = [100 * count / group.total for group in all_groups if group.total for count in group.counts.values()]
    y = Scale(*tick_range(0, max(shares), TICKS), frame.bottom, frame.top)
    areas = [_area(group, lo, hi, bin_width, x, y) for group in merged if group.total]
    axes = bottom_axis(x, frame, name, int((frame.right - frame.left) / 62)) + left_axis(y, frame, "share in %", TICKS)
    label = f"{name}: " + ", ".join(f"{group.total:,} {group.name}" for group in groups)
    return svg(width, height, label, axes, *areas)


def _area(group: Bars, lo: int, hi: int, bin_width: float, x: Scale, y: Scale) -> Markup:
    path = [(x(lo * bin_width), y(0))]
    for number in range(lo, hi):
        share = y(100 * group.counts.get(number, 0) / group.total)
        path += [(x(number * bin_width), share), (x((number + 1) * bin_width), share)]
    return line([*path, (x(hi * bin_width), y(0))], f"area {group.class_}", f"{group.name}: {group.total:,}")


def _merge_bins(bars: Bars, merge: int) -> Bars:
    counts: Counter[int] = Counter()
    for number, count in bars.counts.items():
        counts[number // merge] += count
    return Bars(bars.name, counts, bars.class_)


def legend(groups: Iterable[tuple[str, str]]) -> Markup:
    """Build the legend of colors from (class, name) pairs."""
    return legend_of((swatch("dot", class_), name) for class_, name in groups)


def legend_of(entries: Iterable[tuple[Markup, str]]) -> Markup:
    """Build a legend from (drawing, name) pairs; empty without entries."""
    items = [element("li", drawing, name) for drawing, name in entries]
    return element("ul", *items, class_="legend") if items else Markup("")
