"""Properties of the stream that a console writes to: cursor control, color, width, line breaks."""

from __future__ import annotations

import os
import textwrap
from typing import Any

BOLD, DIM, RED, GREEN, YELLOW, CYAN = "1", "2", "31", "32", "33", "36"
DEFAULT_COLUMNS = 80
MIN_COLUMNS = 40  # of a narrower terminal, which breaks the lines itself


def is_terminal(stream: Any) -> bool:
    """Return True if the stream is a terminal that can rewrite its last line."""
    isatty = getattr(stream, "isatty", None)  # programs put objects in place of sys.stdout that only write
    return bool(isatty and isatty()) and os.environ.get("TERM") != "dumb"


def has_color(stream: Any) -> bool:
    """Return True if the stream is a terminal with colors that the user has not turned off (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def columns(stream: Any) -> int:
    """Return the width of the stream's terminal."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        width = 0
    return max(width or DEFAULT_COLUMNS, MIN_COLUMNS)


def styled(text: str, style: str, stream: Any) -> str:
    """Return the text in a style such as BOLD; unchanged without color or without a style."""
    return f"\x1b[{style}m{text}\x1b[0m" if style and text and has_color(stream) else text


def wrapped(text: str, width: int) -> str:
    """Break the lines of a text between words, with a hanging indent.

    Indented lines stay as they are: examples, and commands that are to be copied.
    """
    return "\n".join(
        line
        if line.startswith(" ") or len(line) <= width
        else textwrap.fill(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )
