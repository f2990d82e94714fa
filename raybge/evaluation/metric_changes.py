"""Metrics before and after, and how sure their difference is: the paired bootstrap over queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raybge.evaluation.significance import interval
from raybge.report.charts import short
from raybge.report.page import cell, table


@dataclass(frozen=True)
class Change:
    """A metric's mean before and after, and the 95% interval of their difference; what is not known is None."""

    metric: str
    before: float | None
    after: float | None
    low: float | None = None
    high: float | None = None
    queries: int | None = None


def change(metric: str, before_Q: np.ndarray, after_Q: np.ndarray, seed: int = 0) -> Change:
    """What became of a metric, from each query's value before and after.

    The interval is that of the mean difference by the paired bootstrap.
    """
    low, high = interval(after_Q - before_Q, seed)
    return Change(metric, float(before_Q.mean()), float(after_Q.mean()), low, high, len(before_Q))


def changes_table(changes: Sequence[Change], before: str = "before", after: str = "after") -> str:
    """The changes as a table under these heads; nothing where there are none."""
    if not changes:
        return ""
    heads = ["metric", before, after, "difference", "95% interval", "verdict"]
    return table(heads, map(_row, changes), set(heads[1:5]))


def _row(change: Change) -> str:
    gap, within, verdict = "–", "–", ""
    if change.before is not None and change.after is not None:
        gap = f"{change.after - change.before:+.4f}"
    if change.low is not None and change.high is not None:
        within = f"{change.low:+.4f} to {change.high:+.4f}"
        verdict = "better" if change.low > 0 else "worse" if change.high < 0 else "may be chance"
    numbers = (number(change.before), number(change.after), gap, within)
    return f"<tr>{cell(change.metric)}{''.join(cell(text, 'number') for text in numbers)}{cell(verdict)}</tr>"


def number(value: float | None) -> str:
    """A metric, a loss or a score in words."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else "no number"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or not value else short(float(value))
