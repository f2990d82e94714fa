"""Metrics before and after training, or of two models, with the confidence interval of their difference.

Console, results file, model card and report pages show the same list of `MetricChange`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from raybge.evaluation.significance import LEVEL, interval
from raybge.report.text import format_metric

if TYPE_CHECKING:
    from raybge.cli.console import Console
    from raybge.evaluation.query_examples import RetrievalResult

FEW_QUERIES = 10  # a bootstrap over fewer says little
METRIC_CHANGES = "metric_changes"  # key in the results of a training run


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
        before_Q, after_Q = np.asarray(before_Q, np.float64), np.asarray(after_Q, np.float64)
        low, high = interval(after_Q - before_Q, seed)
        return cls(metric, float(before_Q.mean()), float(after_Q.mean()), low, high, len(before_Q))

    @property
    def difference(self) -> float | None:
        """Mean after minus mean before."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def texts(self) -> tuple[str, str, str, str, str, str]:
        """The change as a table row: metric, before, after, difference, interval, verdict."""
        range_text, verdict = "–", ""
        difference = "–" if self.difference is None else f"{self.difference:+.4f}"
        if self.low is not None and self.high is not None:
            range_text = f"{self.low:+.4f} to {self.high:+.4f}"
            verdict = "better" if self.low > 0 else "worse" if self.high < 0 else "not significant"
            if self.queries is not None and self.queries < FEW_QUERIES:
                verdict = "too few queries"
        return self.metric, format_metric(self.before), format_metric(self.after), difference, range_text, verdict


def training_changes(
    first: RetrievalResult | None,
    last: RetrievalResult | None,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> list[MetricChange]:
    """Compare a training run's evaluations before its first step and after its last.

    Args:
        first: Result of each query before training; None if another process measured it, or none did.
        last: Result of each query after training.
        before: Means before training as far as known, used without `first`.
        after: Means after training, used without `first`.

    Returns:
        The changes: query by query if both results are known, otherwise of the means.
    """
    if first and last:
        return [MetricChange.from_queries(name, first.values[name], last.values[name]) for name in last.values]
    return [MetricChange(name, before.get(name), value) for name, value in after.items()]


def to_json(changes: Iterable[MetricChange]) -> dict[str, dict[str, float | int | None]]:
    """Return the changes by metric, as the results of a run contain them."""
    return {
        change.metric: {
            "before": change.before,
            "after": change.after,
            "difference": change.difference,
            "low": change.low,
            "high": change.high,
            "queries": change.queries,
        }
        for change in changes
    }


def changes_in(results: Mapping[str, Any]) -> list[MetricChange]:
    """Return the changes that the results of a training run contain; none without an evaluation."""
    return changes_from_json(results.get(METRIC_CHANGES, {}))


def changes_from_json(values_by_metric: Mapping[str, Mapping[str, Any]]) -> list[MetricChange]:
    """Return the changes that `to_json` has written."""
    return [
        MetricChange(metric, **{name: value for name, value in values.items() if name != "difference"})
        for metric, values in values_by_metric.items()
    ]


def print_changes(
    changes: Iterable[MetricChange], console: Console, before: str = "before", after: str = "after"
) -> None:
    """Print the changes as a table.

    Args:
        changes: The changes.
        console: Receives the table.
        before: Head of the column of the values before.
        after: Head of the column of the values after.
    """
    head = ("metric", before, after, "difference", f"{LEVEL:.0%} interval", "verdict")
    rows = [change.texts for change in changes]
    used = 6 if any(row[-1] for row in rows) else 4  # without an interval there is no verdict
    console.table(head[:used], [row[:used] for row in rows])
