"""Charts as inline SVG: elements, axes, marks and labels.

Every function returns `Markup`. `element` escapes each text and attribute that is not `Markup` already, so no text
enters a page unescaped. Colors and fonts are classes that `page.css` defines for light and dark mode. Lengths are in
pixels, y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from raybge.report.scales import Axis, Categories, Scale, Tick

CHARACTER = 6.6  # mean width of a character in a tick label
LINE = 15  # height of a line of text


@dataclass(frozen=True)
class Frame:
    """Rectangle that values are drawn in."""

    left: float
    top: float
    right: float
    bottom: float

    def padded(self, margin: float) -> Frame:
        """Return the frame widened by `margin` on each side: its own edge would cut lines on it in half."""
        return Frame(self.left - margin, self.top - margin, self.right + margin, self.bottom + margin)


def element(tag: str, *content: str, **attributes: Any) -> Markup:
    """Build one element; `class_` becomes class, `text_anchor` text-anchor, and None omits an attribute."""
    opening = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _attribute(value))
        for name, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(tag, opening, Markup("").join(content))


def svg(width: float, height: float, label: str, *content: Markup, scrolls: bool = False) -> Markup:
    """Build a drawing that scales with its container.

    Args:
        width: Width of the coordinate system.
        height: Height of the coordinate system.
        label: Description for screen readers.
        *content: Elements.
        scrolls: Keep the width and scroll in a narrower container.

    Returns:
        The `svg` element.
    """
    style = f"min-width:{width:.0f}px" if scrolls else None
    return element("svg", *content, viewBox=f"0 0 {width:.0f} {height:.0f}", role="img", aria_label=label, style=style)


def clipped(frame: Frame, *content: Markup) -> Markup:
    """Clip the content to the frame."""
    width, height = frame.right - frame.left, frame.bottom - frame.top
    box = f"{frame.left:.1f} {frame.top:.1f} {width:.1f} {height:.1f}"
    return element("svg", *content, x=frame.left, y=frame.top, width=width, height=height, viewBox=box)


def text_label(x: float, y: float, text: str, class_: str = "tick", anchor: str = "middle", full: str = "") -> Markup:
    """Build a line of text; `full`, if it differs, is its tooltip."""
    content = [text, element("title", full)] if full and full != text else [text]
    return element("text", *content, x=x, y=y, class_=class_, text_anchor=anchor)


def line(points: Sequence[tuple[float, float]], class_: str, title: str = "", **data: Any) -> Markup:
    """Build straight lines from point to point; `title` is the tooltip."""
    path = "M" + "L".join(f"{_attribute(float(x))} {_attribute(float(y))}" for x, y in points)
    return element("path", _title(title), d=path, class_=class_, **data)


def mark(shape: str, x: float, y: float, class_: str, title: str = "", **data: Any) -> Markup:
    """Build a mark of a point.

    Args:
        shape: "dot", "ring", "cross", or a triangle that points "down" or "up" out of the chart.
        x: Position.
        y: Position.
        class_: Its color.
        title: The tooltip.
        **data: Further attributes, such as `data_t`.

    Returns:
        The element.
    """
    if shape in ("dot", "ring"):
        radius = 4 if shape == "dot" else 3.4
        return element("circle", _title(title), cx=x, cy=y, r=radius, class_=f"{shape} {class_}", **data)
    path = {
        "cross": f"M{_attribute(x - 3.5)} {_attribute(y - 3.5)}l7 7m0 -7l-7 7",
        "down": f"M{_attribute(x - 4.5)} {_attribute(y - 7)}h9l-4.5 7z",
        "up": f"M{_attribute(x - 4.5)} {_attribute(y + 7)}h9l-4.5 -7z",
    }[shape]
    return element("path", _title(title), d=path, class_=f"{'cross' if shape == 'cross' else 'dot'} {class_}", **data)


def swatch(shape: str, class_: str) -> Markup:
    """Build a mark for a legend."""
    return element("svg", mark(shape, 8, 7, class_), width=16, height=14, aria_hidden="true")


def bottom_axis(axis: Axis, frame: Frame, label: str, max_ticks: int) -> Markup:
    """Build ticks, grid and label below a frame; names of `Categories` that do not fit are rotated."""
    elements = []
    ticks = axis.ticks(max_ticks)
    width = axis.band if isinstance(axis, Categories) else math.inf
    rotated = any(len(tick.label) * CHARACTER > width for tick in ticks)
    if isinstance(axis, Categories) and rotated:
        ticks = axis.ticks(int((frame.right - frame.left) / LINE))
    for tick in ticks:
        class_ = "grid" if tick.label else "small"
        top = frame.top if tick.label else frame.bottom - 4
        elements.append(line([(tick.at, top), (tick.at, frame.bottom)], class_))
        y = frame.bottom + 17
        if rotated and tick.label:
            name = text_label(0, 0, tick.label, anchor="end", full=tick.full)
            elements.append(element("g", name, transform=f"translate({tick.at + 4:.1f} {y - 4:.1f}) rotate(-35)"))
        elif tick.label:
            elements.append(text_label(tick.at, y, tick.label, full=tick.full))
    below = rotated_height(ticks) if rotated else 17
    elements.append(text_label((frame.left + frame.right) / 2, frame.bottom + below + 20, label, "name"))
    return Markup("").join(elements)


def rotated_height(ticks: Sequence[Tick]) -> float:
    """Return the height that rotated labels need below the axis."""
    return 12 + 0.6 * CHARACTER * max((len(tick.label) for tick in ticks), default=0)


def left_axis(scale: Scale, frame: Frame, label: str, max_ticks: int) -> Markup:
    """Build ticks, grid and label of a frame's left side; the label is above the axis, so that it is horizontal."""
    elements = [text_label(frame.left - 8, frame.top - 14, label, "name", "start")]
    for tick in scale.ticks(max_ticks):
        elements.append(line([(frame.left, tick.at), (frame.right, tick.at)], "grid"))
        elements.append(text_label(frame.left - 8, tick.at + 4, tick.label, anchor="end"))
    return Markup("").join(elements)


def _title(text: str) -> Markup:
    return element("title", text) if text else Markup("")


def _attribute(value: Any) -> str:
    """Format floats with a tenth of a pixel, the visible precision; other values by `str`."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
