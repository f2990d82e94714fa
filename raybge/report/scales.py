"""Scales of charts: they map values to pixels and choose the ticks of an axis. Pixels grow rightwards and downwards."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from raybge.report.text import distinct_labels, format_value


def tick_step(lo: float, hi: float, max_ticks: int) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten with at most `max_ticks` multiples from lo to hi."""
    step = 10.0 ** math.floor(math.log10((hi - lo) / max(max_ticks, 1)))
    steps = (step * factor for factor in (1, 2, 5, 10, 20, 50, 100))
    return next(s for s in steps if math.floor(hi / s + 1e-9) - math.ceil(lo / s - 1e-9) < max_ticks)


def tick_range(lo: float, hi: float, max_ticks: int) -> tuple[float, float]:
    """Widen [lo, hi] to the nearest numbers that are ticks of an axis between them."""
    lo, hi = nonempty_range(lo, hi)
    while True:
        step = tick_step(lo, hi, max_ticks)
        wider = math.floor(lo / step + 1e-9) * step, math.ceil(hi / step - 1e-9) * step
        if wider == (lo, hi):
            return wider
        lo, hi = wider  # it may now have more than `max_ticks` ticks: choose the step again


def nonempty_range(lo: float, hi: float) -> tuple[float, float]:
    """Return (lo, hi), widened on both sides if they are equal."""
    margin = 0.05 * abs(lo) or 0.5
    return (lo, hi) if lo < hi else (lo - margin, hi + margin)


@dataclass(frozen=True)
class Tick:
    """Tick of an axis at pixel `at`; one without a label is drawn small. `full` is the label before shortening."""

    at: float
    label: str = ""
    full: str = ""


@dataclass(frozen=True)
class Scale:
    """Linear or logarithmic map from [lo, hi] to pixels [start, end]; values outside are clamped.

    Args:
        lo: The smallest value.
        hi: The largest value.
        start: The pixel of `lo`.
        end: The pixel of `hi`.
        log: Map logarithms.
        whole: Place ticks at whole numbers only.
    """

    lo: float
    hi: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        value, lo, hi = min(max(value, self.lo), self.hi), self.lo, self.hi
        if self.log:
            value, lo, hi = math.log(value), math.log(lo), math.log(hi)
        return self.start + (value - lo) / (hi - lo) * (self.end - self.start)

    def ticks(self, max_ticks: int) -> list[Tick]:
        """Return at most `max_ticks` labeled ticks at round numbers, and small ones between powers of a log scale."""
        return (self._log_ticks(max_ticks) if self.log else []) or self._linear_ticks(max_ticks)

    def _linear_ticks(self, max_ticks: int) -> list[Tick]:
        step = tick_step(self.lo, self.hi, max_ticks)
        if self.whole:
            step = max(round(step), 1)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.lo / step - 1e-9), math.floor(self.hi / step + 1e-9)
        values = [i * step for i in range(first, last + 1)]
        plain = decimals <= 4 and abs(self.hi) < 1e7
        return [Tick(self(v), f"{v:,.{decimals}f}" if plain else format_value(float(v))) for v in values]

    def _log_ticks(self, max_ticks: int) -> list[Tick]:
        """Return ticks at powers of ten and between; none if there are fewer than two round numbers."""
        first, last = math.floor(math.log10(self.lo)), math.ceil(math.log10(self.hi))
        powers = [
            p for p in range(first, last + 1) if self.lo <= 10.0**p * (1 + 1e-9) and 10.0**p <= self.hi * (1 + 1e-9)
        ]
        every = math.ceil(len(powers) / max_ticks) if powers else 1
        labeled = {(p, 1) for p in powers[::every]}
        if len(powers) < 3:
            labeled = {(p, factor) for p in range(first, last + 1) for factor in (1, 2, 5)}
        ticks = []
        for power in range(first, last + 1):
            for factor in range(1, 10):
                value = factor * 10.0**power
                if self.lo * (1 - 1e-9) <= value <= self.hi * (1 + 1e-9):
                    label = ""
                    if (power, factor) in labeled:
                        label = format_value(int(value) if self.whole and value >= 1 else value)
                    ticks.append(Tick(self(value), label))
        return ticks if 2 <= sum(bool(tick.label) for tick in ticks) <= max_ticks + 1 else []


@dataclass(frozen=True)
class Categories:
    """Map from listed values to pixels [start, end]: each value to the middle of its band."""

    values: tuple[Hashable, ...]
    start: float
    end: float

    @property
    def band(self) -> float:
        """Width of one value's band in pixels."""
        return abs(self.end - self.start) / len(self.values)

    def __call__(self, value: Hashable) -> float:
        """Return the pixel of a value."""
        return self.start + (self.values.index(value) + 0.5) / len(self.values) * (self.end - self.start)

    def ticks(self, max_labels: int, label_length: int = 16) -> list[Tick]:
        """Return a tick for each value, at most `max_labels` of them labeled, in `label_length` characters each."""
        every = math.ceil(len(self.values) / max(max_labels, 1))
        names = [format_value(value) if value != "" else "(empty)" for value in self.values]
        labels = distinct_labels(names, label_length)
        return [
            Tick(self(value), label if i % every == 0 else "", name)
            for i, (value, label, name) in enumerate(zip(self.values, labels, names, strict=True))
        ]


Axis = Scale | Categories


def spread_labels(positions: Sequence[float], gap: float, lo: float, hi: float) -> list[float]:
    """Move positions between lo and hi, as little as possible, so that they are at least `gap` apart."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = list(positions)
    below = lo - gap
    for i in order:
        moved[i] = below = max(positions[i], below + gap)
    above = hi + gap
    for i in reversed(order):
        moved[i] = above = min(moved[i], above - gap)
    return moved
