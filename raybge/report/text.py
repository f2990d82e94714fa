"""Format values as the text of pages and charts: numbers, durations, commands, shortened names."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from raybge.util.text_format import format_duration as format_duration
from raybge.util.text_format import shorten as shorten

EXCERPT = 320  # characters of a long text that a page shows


def format_value(value: Any) -> str:
    """Format a value for a label or a table cell: floats with four significant digits, other values by `str`."""
    if not isinstance(value, float):
        return str(value)
    # 1e-06 and 2e+05 are longer than necessary.
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def format_metric(value: float | None) -> str:
    """Format a metric, loss or score with four decimals; «–» for None, «not finite» for inf and nan."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or not value else format_value(float(value))


def format_flag(value: Any) -> str:
    """Format a flag's value; None and the empty string stay visible."""
    return "–" if value is None else format_value(value) if value != "" else '""'


def excerpt(text: str) -> str:
    """Return the beginning of a text on one line, at most EXCERPT characters."""
    line = " ".join(text[: 4 * EXCERPT].split())
    return line if len(line) <= EXCERPT else line[: EXCERPT - 1] + "…"


def distinct_labels(names: Sequence[str], max_length: int) -> list[str]:
    """Shorten each name to `max_length` characters; a prefix that all long names share is dropped first."""
    long_names = [name for name in names if len(name) > max_length]
    shared = takewhile(lambda characters: len(set(characters)) == 1, zip(*long_names, strict=False))
    prefix = len(list(shared)) if len(long_names) > 1 else 0
    return [shorten("…" + name[prefix:] if prefix > 1 and name in long_names else name, max_length) for name in names]


def shell_command(words: Sequence[str]) -> str:
    """Quote the words of a command for a POSIX shell: one flag per line, one value per line if they are long."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    joined = (" ".join(line) if sum(map(len, line)) < 100 else " \\\n        ".join(line) for line in lines if line)
    return " \\\n    ".join(joined)
