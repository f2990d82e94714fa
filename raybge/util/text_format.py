"""Durations, and texts cut to a length, as people read them."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """Format a duration with at most two units: 12.5 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60:,} h"


def shorten(text: str, max_length: int) -> str:
    """Cut a text to `max_length` characters in its middle, since names often share their beginning or their end."""
    if len(text) <= max_length:
        return text
    tail = (max_length - 1) // 3
    return text[: max_length - 1 - tail] + "…" + text[len(text) - tail :]
