"""Charts of many numbers: a value over the steps of a run, and how values are distributed."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from raybge.report.charts import (
    Frame,
    Scale,
    bottom_axis,
    clipped,
    element,
    even_step,
    left_axis,
    line,
    mark,
    rounded_out,
    short,
    svg,
)
from raybge.report.page import chart

WIDE, NARROW, SMALL = 1072.0, 440.0, 380.0  # widths of a chart: a large console, a phone, one of several side by side
MOST = 400  # points of a curve
BARS = 60  # of a histogram
TICKS = 6
Point = tuple[float, float]


# --- curves -----------------------------------------------------------------------------------------------------------


def curve(points: Sequence[Point], name: str, x_name: str = "training step", *, trend: bool = False) -> str:
    """A value over the steps for any console; nothing where no point is a finite number. See `curve_of`."""
    wide, narrow = (curve_of(points, name, x_name, width, trend=trend) for width in (WIDE, NARROW))
    return chart(wide, narrow)


def small_curve(points: Sequence[Point], name: str, x_name: str = "training step", *, steady: bool = False) -> str:
    """The same, to stand beside others."""
    return chart(curve_of(points, name, x_name, SMALL, steady=steady))


def curve_of(
    points: Sequence[Point], name: str, x_name: str, width: float, *, trend: bool = False, steady: bool = False
) -> str:
    """The drawing, of many points their means; `trend`: pale, and what many tend to as a line on top.

    `steady`: a value that stays about the same, of which some, such as the first step's time, are far off: these do
    not stretch the axis but lie at its end.
    """
    good = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not good:
        return ""
    thin = thinned(good, MOST)
    height = 250.0 if width == SMALL else 340.0 if width == WIDE else 290.0
    frame = Frame(66, 34, width - 22, height - 50)
    first, last = thin[0][0], thin[-1][0]
    x = Scale(first, last if last > first else first + 1, frame.left, frame.right, whole=True)
    y = Scale(*_span([value for _, value in thin], steady), frame.bottom, frame.top)
    title = f"{name}: from {short(thin[0][1])} to {short(thin[-1][1])}"
    path = [(x(a), y(b)) for a, b in thin]
    drawn = [mark("dot", *path[0], "r6")] if len(path) == 1 else [line(path, "curve r6", title)]
    if trend and len(thin) > 20:
        drawn = [line(path, "curve r1", title), line([(x(a), y(b)) for a, b in smoothed(thin)], "curve trend r7")]
    room = Frame(frame.left - 5, frame.top - 5, frame.right + 5, frame.bottom + 5)
    axes = bottom_axis(x, frame, x_name, int((frame.right - frame.left) / 62)) + left_axis(y, frame, name, TICKS)
    return svg(width, height, f"{title} over {len(good):,} points", axes, clipped(room, *drawn))


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: the means of as many neighbours as it takes."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return list(points)
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [(statistics.fmean(a for a, _ in part), statistics.fmean(b for _, b in part)) for part in parts]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Each value's mean with its neighbours, a twentieth of all on either side, fewer at the ends."""
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    reach = max(1, len(points) // 20)
    found = []
    for i, (at, _) in enumerate(points):
        around = min(reach, i, len(points) - 1 - i)
        found.append((at, (sums[i + around + 1] - sums[i - around]) / (2 * around + 1)))
    return found


def _span(values: Sequence[float], steady: bool) -> tuple[float, float]:
    lo, hi = min(values), max(values)
    if steady and len(values) >= 4:
        first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
        far = max(4 * (third - first), 0.1 * abs(middle))
        lo, hi = max(lo, first - far), min(hi, third + far)
    return rounded_out(0 if steady and lo > 0 else lo, hi, TICKS)


# --- histograms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bars:
    """How many values lie in [i, i + 1) times a width, by i. `class_` is the colour."""

    name: str
    counts: Mapping[int, int]
    class_: str

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def binned(values: Iterable[float], width: float) -> Counter[int]:
    """Counts for `Bars`; what is no finite number is left out."""
    return Counter(math.floor(value / width) for value in values if math.isfinite(value))


def bin_width(values: Iterable[float]) -> float:
    """A round width at which all values lie in few bins: a sample in many of them is ragged."""
    good = [value for value in values if math.isfinite(value)]
    lo, hi = (min(good), max(good)) if good else (0.0, 1.0)
    return even_step(lo, hi if hi > lo else lo + (abs(lo) or 1.0), BARS // 2 - 1)


def histogram(
    groups: Sequence[Bars], width: float, name: str, *, small: bool = False, like: Sequence[Bars] = ()
) -> str:
    """Each group's shares over the value, the groups on top of one another; nothing where all are empty.

    Args:
        width: of a bin; where there are too many of them, several are drawn as one.
        name: what the values are.
        small: to stand beside others.
        like: groups of which a neighbour is drawn, to have the same axes.
    """
    if not any(each.total for each in groups):
        return ""
    if small:
        return chart(histogram_of(groups, width, name, SMALL, like))
    return chart(histogram_of(groups, width, name, WIDE, like), histogram_of(groups, width, name, NARROW, like))


def histogram_of(groups: Sequence[Bars], width: float, name: str, wide: float, like: Sequence[Bars] = ()) -> str:
    """The drawing; `wide` is its width in pixels."""
    numbers = [number for each in (*groups, *like) for number in each.counts]
    several = math.ceil((max(numbers) - min(numbers) + 1) / BARS)
    merged = [_merged(each, several) for each in groups]
    width *= several
    numbers = [number // several for number in numbers]
    lo, hi = min(numbers), max(numbers) + 1
    height = 250.0 if wide == SMALL else 300.0
    frame = Frame(60, 34, wide - 22, height - 50)
    x = Scale(lo * width, hi * width, frame.left, frame.right)
    shares = [100 * count / each.total for each in (*merged, *(_merged(e, several) for e in like)) if each.total
              for count in each.counts.values()]  # fmt: skip
    y = Scale(*rounded_out(0, max(shares), TICKS), frame.bottom, frame.top)
    drawn = []
    for each in merged:
        if not each.total:
            continue
        path = [(x(lo * width), y(0))]
        for number in range(lo, hi):
            share = y(100 * each.counts.get(number, 0) / each.total)
            path += [(x(number * width), share), (x((number + 1) * width), share)]
        drawn.append(line([*path, (x(hi * width), y(0))], f"area {each.class_}", f"{each.name}: {each.total:,}"))
    axes = bottom_axis(x, frame, name, int((frame.right - frame.left) / 62)) + left_axis(y, frame, "share in %", TICKS)
    label = f"{name}: " + ", ".join(f"{each.total:,} {each.name}" for each in groups)
    return svg(wide, height, label, axes, *drawn)


def _merged(bars: Bars, several: int) -> Bars:
    counts: Counter[int] = Counter()
    for number, count in bars.counts.items():
        counts[number // several] += count
    return Bars(bars.name, counts, bars.class_)


def legend(groups: Iterable[tuple[str, str]]) -> str:
    """What colours mean: (class, name) of each."""
    items = "".join(
        f"<li>{element('svg', mark('dot', 8, 7, class_), width=16, height=14, aria_hidden='true')}{escape(name)}</li>"
        for class_, name in groups
    )
    return f'<ul class="legend">{items}</ul>' if items else ""
