"""Metrics before and after training, with the confidence interval of their difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from raybge.evaluation.significance import interval
from raybge.report.text import format_metric


@dataclass(frozen=True)
class MetricChange:
    """A metric's means before and after, and the 95% interval of their difference; None where unknown.

    Args:
        metric: Name of the metric.
        before: Mean before.
        after: Mean after.
        low: Lower end of the difference's interval.
        high: Upper end of the difference's interval.
        queries: Number of queries.
    """

    metric: str
    before: float | None
    after: float | None
    low: float | None = None
    high: float | None = None
    queries: int | None = None

    @classmethod
    def from_queries(cls, metric: str, before_Q: np.ndarray, after_Q: np.ndarray, seed: int = 0) -> Self:
        """Compare each query's value before and after; the interval is a paired bootstrap (see `significance`)."""
        low, high = interval(after_Q - before_Q, seed)
        return cls(metric, float(before_Q.mean()), float(after_Q.mean()), low, high, len(before_Q))

    @property
    def texts(self) -> tuple[str, str, str, str, str, str]:
        """The change as a table row: metric, before, after, difference, interval, verdict."""
        difference, range_text, verdict = "–", "–", ""
        if self.before is not None and self.after is not None:
            difference = f"{self.after - self.before:+.4f}"
        if self.low is not None and self.high is not None:
            range_text = f"{self.low:+.4f} to {self.high:+.4f}"
            verdict = "better" if self.low > 0 else "worse" if self.high < 0 else "not significant"
        return self.metric, format_metric(self.before), format_metric(self.after), difference, range_text, verdict
