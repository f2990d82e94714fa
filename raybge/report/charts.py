"""Charts as inline SVG: scales with ticks, axes, marks and labels.

Everything is a function from values to text. Colours and fonts are classes that `page.css` gives a light and a dark
look. Texts are escaped here; what is called `content` is SVG already. Lengths are in pixels, y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import takewhile
from typing import Any

CHARACTER = 6.6  # width of one in a tick's font, on average
LINE = 15  # height of a line of text


# --- numbers ----------------------------------------------------------------------------------------------------------


def short(value: Any) -> str:
    """A value for a label or a table's cell: four digits of a fraction, others as they are."""
    if not isinstance(value, float):
        return str(value)
    # 1e-06 and 2e+05 are longer than they need be.
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def cut(text: str, most: int) -> str:
    """A text of at most `most` characters: the middle gives way, since many begin alike and many end alike."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 3
    return text[: most - 1 - tail] + "…" + text[len(text) - tail :]


def told_apart(names: Sequence[str], most: int) -> list[str]:
    """Each name in at most `most` characters; what long ones have in common at their beginning is left out first."""
    long = [name for name in names if len(name) > most]
    alike = takewhile(lambda characters: len(set(characters)) == 1, zip(*long, strict=False))
    begin = len(list(alike)) if len(long) > 1 else 0
    return [cut("…" + name[begin:] if begin > 1 and name in long else name, most) for name in names]


def even_step(lo: float, hi: float, most: int) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that has at most `most` multiples from lo to hi."""
    step = 10.0 ** math.floor(math.log10((hi - lo) / max(most, 1)))
    steps = (step * factor for factor in (1, 2, 5, 10, 20, 50, 100))
    return next(s for s in steps if math.floor(hi / s + 1e-9) - math.ceil(lo / s - 1e-9) < most)


def rounded_out(lo: float, hi: float, most: int) -> tuple[float, float]:
    """The nearest numbers around lo and hi that are ticks of an axis between them."""
    lo, hi = apart(lo, hi)
    while True:
        step = even_step(lo, hi, most)
        wider = math.floor(lo / step + 1e-9) * step, math.ceil(hi / step - 1e-9) * step
        if wider == (lo, hi):
            return wider
        lo, hi = wider  # with more ticks than before, maybe too many: look again


def apart(lo: float, hi: float) -> tuple[float, float]:
    """lo and hi, moved apart where they are the same."""
    room = 0.05 * abs(lo) or 0.5
    return (lo, hi) if lo < hi else (lo - room, hi + room)


# --- scales -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tick:
    """A place on an axis; without a label it is a small one."""

    at: float
    label: str = ""
    full: str = ""  # the whole label, where it is cut


@dataclass(frozen=True)
class Scale:
    """Where numbers from lo to hi lie from pixel `start` to pixel `end`; those beyond lie at the ends."""

    lo: float
    hi: float
    start: float
    end: float
    log: bool = False
    whole: bool = False  # ticks at whole numbers alone

    def __call__(self, value: float) -> float:
        value, lo, hi = min(max(value, self.lo), self.hi), self.lo, self.hi
        if self.log:
            value, lo, hi = math.log(value), math.log(lo), math.log(hi)
        return self.start + (value - lo) / (hi - lo) * (self.end - self.start)

    def ticks(self, most: int) -> list[Tick]:
        """At most `most` labelled ticks at round numbers, and small ones between the powers of a log scale."""
        return (self._log_ticks(most) if self.log else []) or self._even_ticks(most)

    def _even_ticks(self, most: int) -> list[Tick]:
        step = even_step(self.lo, self.hi, most)
        if self.whole:
            step = max(round(step), 1)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.lo / step - 1e-9), math.floor(self.hi / step + 1e-9)
        values = [i * step for i in range(first, last + 1)]
        plain = decimals <= 4 and abs(self.hi) < 1e7
        return [Tick(self(v), f"{v:,.{decimals}f}" if plain else short(float(v))) for v in values]

    def _log_ticks(self, most: int) -> list[Tick]:
        """None at all where fewer than two round numbers lie inside."""
        first, last = math.floor(math.log10(self.lo)), math.ceil(math.log10(self.hi))
        powers = [
            p for p in range(first, last + 1) if self.lo <= 10.0**p * (1 + 1e-9) and 10.0**p <= self.hi * (1 + 1e-9)
        ]
        every = math.ceil(len(powers) / most) if powers else 1
        labelled = {(p, 1) for p in powers[::every]}
        if len(powers) < 3:
            labelled = {(p, factor) for p in range(first, last + 1) for factor in (1, 2, 5)}
        ticks = []
        for power in range(first, last + 1):
            for factor in range(1, 10):
                value = factor * 10.0**power
                if self.lo * (1 - 1e-9) <= value <= self.hi * (1 + 1e-9):
                    label = (
                        short(int(value) if self.whole and value >= 1 else value) if (power, factor) in labelled else ""
                    )
                    ticks.append(Tick(self(value), label))
        return ticks if 2 <= sum(bool(tick.label) for tick in ticks) <= most + 1 else []


@dataclass(frozen=True)
class Categories:
    """Where listed values lie: each in the middle of its band."""

    values: tuple[Hashable, ...]
    start: float
    end: float

    @property
    def band(self) -> float:
        return abs(self.end - self.start) / len(self.values)

    def __call__(self, value: Hashable) -> float:
        return self.start + (self.values.index(value) + 0.5) / len(self.values) * (self.end - self.start)

    def ticks(self, most: int, characters: int = 16) -> list[Tick]:
        """A tick for each value; where there are more than `most`, only every so many have labels."""
        every = math.ceil(len(self.values) / max(most, 1))
        names = [short(value) if value != "" else "(empty)" for value in self.values]
        labels = told_apart(names, characters)
        return [
            Tick(self(value), label if i % every == 0 else "", name)
            for i, (value, label, name) in enumerate(zip(self.values, labels, names, strict=True))
        ]


Axis = Scale | Categories


def spread(places: Sequence[float], gap: float, lo: float, hi: float) -> list[float]:
    """The places moved as little as needed for labels of height `gap`, between lo and hi."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    below = lo - gap
    for i in order:
        moved[i] = below = max(places[i], below + gap)
    above = hi + gap
    for i in reversed(order):
        moved[i] = above = min(moved[i], above - gap)
    return moved


# --- SVG --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """The rectangle that values are drawn in."""

    left: float
    top: float
    right: float
    bottom: float


def element(tag: str, *content: str, **attributes: Any) -> str:
    """One element; `class_` is class, `text_anchor` is text-anchor, None is left out."""
    given = (
        f' {name.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{''.join(given)}>{''.join(content)}</{tag}>"


def svg(width: float, height: float, label: str, *content: str, scrolls: bool = False) -> str:
    """A drawing that takes the width of what it stands in, or `scrolls` there instead of becoming smaller.

    `label` says what it shows to those who do not see it.
    """
    style = f"min-width:{width:.0f}px" if scrolls else None
    return element("svg", *content, viewBox=f"0 0 {width:.0f} {height:.0f}", role="img", aria_label=label, style=style)


def clipped(frame: Frame, *content: str) -> str:
    """What is inside the frame of what is drawn."""
    width, height = frame.right - frame.left, frame.bottom - frame.top
    box = f"{frame.left:.1f} {frame.top:.1f} {width:.1f} {height:.1f}"
    return element("svg", *content, x=frame.left, y=frame.top, width=width, height=height, viewBox=box)


def words(x: float, y: float, text: str, class_: str = "tick", anchor: str = "middle", full: str = "") -> str:
    """A line of text; the `full` one is its tooltip where it is longer."""
    more = element("title", escape(full)) if full and full != text else ""
    return element("text", escape(text) + more, x=x, y=y, class_=class_, text_anchor=anchor)


def line(points: Sequence[tuple[float, float]], class_: str, title: str = "", **data: Any) -> str:
    """Straight lines from point to point."""
    path = "M" + "L".join(f"{_attribute(float(x))} {_attribute(float(y))}" for x, y in points)
    return element("path", _title(title), d=path, class_=class_, **data)


def mark(shape: str, x: float, y: float, class_: str, title: str = "", **data: Any) -> str:
    """A point as a "dot", a "ring", a "cross" or a triangle that points "down" or "up" and out of the chart."""
    if shape in ("dot", "ring"):
        radius = 4 if shape == "dot" else 3.4
        return element("circle", _title(title), cx=x, cy=y, r=radius, class_=f"{shape} {class_}", **data)
    path = {
        "cross": f"M{_attribute(x - 3.5)} {_attribute(y - 3.5)}l7 7m0 -7l-7 7",
        "down": f"M{_attribute(x - 4.5)} {_attribute(y - 7)}h9l-4.5 7z",
        "up": f"M{_attribute(x - 4.5)} {_attribute(y + 7)}h9l-4.5 -7z",
    }[shape]
    return element("path", _title(title), d=path, class_=f"{'cross' if shape == 'cross' else 'dot'} {class_}", **data)


def bottom_axis(axis: Axis, frame: Frame, label: str, most: int) -> str:
    """Ticks, a grid and the label under a frame; `Categories` whose names do not fit stand askew."""
    drawn = []
    ticks = axis.ticks(most)
    room = axis.band if isinstance(axis, Categories) else math.inf
    askew = any(len(tick.label) * CHARACTER > room for tick in ticks)
    if isinstance(axis, Categories) and askew:
        ticks = axis.ticks(int((frame.right - frame.left) / LINE))
    for tick in ticks:
        class_ = "grid" if tick.label else "small"
        top = frame.top if tick.label else frame.bottom - 4
        drawn.append(line([(tick.at, top), (tick.at, frame.bottom)], class_))
        y = frame.bottom + 17
        if askew and tick.label:
            turned = words(0, 0, tick.label, anchor="end", full=tick.full)
            drawn.append(element("g", turned, transform=f"translate({tick.at + 4:.1f} {y - 4:.1f}) rotate(-35)"))
        elif tick.label:
            drawn.append(words(tick.at, y, tick.label, full=tick.full))
    below = askew_height(ticks) if askew else 17
    drawn.append(words((frame.left + frame.right) / 2, frame.bottom + below + 20, label, "name"))
    return "".join(drawn)


def askew_height(ticks: Sequence[Tick]) -> float:
    """How far labels that stand askew reach under the axis."""
    return 12 + 0.6 * CHARACTER * max((len(tick.label) for tick in ticks), default=0)


def left_axis(scale: Scale, frame: Frame, label: str, most: int) -> str:
    """Ticks, a grid and the label of a frame's left side, the label above it where it needs no turning of heads."""
    drawn = [words(frame.left - 8, frame.top - 14, label, "name", "start")]
    for tick in scale.ticks(most):
        drawn.append(line([(frame.left, tick.at), (frame.right, tick.at)], "grid"))
        drawn.append(words(frame.left - 8, tick.at + 4, tick.label, anchor="end"))
    return "".join(drawn)


def _title(text: str) -> str:
    return element("title", escape(text)) if text else ""


def _attribute(value: Any) -> str:
    """A number in tenths of a pixel, which is all that is seen; others as they are."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
