"""Report page of an evaluation, next to the metrics file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from raybge.evaluation.metric_changes import MetricChange
from raybge.evaluation.metrics import METRICS
from raybge.evaluation.ranking_examples import RankingExamples
from raybge.report.page import render, write_page
from raybge.report.run_details import RunDetails
from raybge.report.series import Bars, binned, histogram
from raybge.report.text import format_duration, format_metric

CHARTS = 6
BAR_WIDTH = 0.05


@dataclass(frozen=True)
class EvaluationReport:
    """Content of the page.

    Args:
        run: The run's details.
        metrics: Means by name, such as "nDCG@10"; entries without "@" are counts.
        per_query: Each query's value by metric, as far as available.
        comparison: Metrics of another model (`before`) and of this one (`after`).
        compared_with: Name of the other model.
        seconds: Duration of each stage.
        examples: Worst queries, and those on which the two models differ most; None if they could not be read.
    """

    run: RunDetails
    metrics: Mapping[str, float]
    per_query: Mapping[str, Iterable[float]] = field(default_factory=dict)
    comparison: Sequence[MetricChange] = ()
    compared_with: str = "before"
    seconds: Mapping[str, float] = field(default_factory=dict)
    examples: RankingExamples | None = None


def write(path: str, report: EvaluationReport) -> None:
    """Write the page to a path or URI."""
    write_page(path, html(report), "--metrics_file")


def html(report: EvaluationReport) -> str:
    """Render the page."""
    metrics = {name: value for name, value in report.metrics.items() if "@" in name}
    counts = [(name, f"{value:,}") for name, value in report.metrics.items() if name not in metrics]
    main = next((name for name in (*METRICS, *metrics) if name in metrics), None)
    ranks, rows = _metric_rows(metrics)
    return render(
        "evaluation/page.html.jinja",
        report.run.head(f"{main} {format_metric(metrics[main])}" if main else "Evaluation without a metric"),
        report=report,
        summary=[f"total time {format_duration(sum(report.seconds.values()))}"] if report.seconds else [],
        figures=counts,
        ranks=ranks,
        metric_rows=rows,
        query_charts=_query_charts(report.per_query),
        examples=report.examples or RankingExamples(""),
    )


def _metric_rows(metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Return the table's columns, such as "@10", and a row for each kind of metric."""
    parts = [name.split("@", 1) for name in metrics]
    ranks = sorted({rank for _, rank in parts}, key=lambda rank: (len(rank), rank))
    rows = [
        [kind, *(format_metric(metrics.get(f"{kind}@{rank}")) for rank in ranks)]
        for kind in dict.fromkeys(kind for kind, _ in parts)
    ]
    return [f"@{rank}" for rank in ranks], rows


def _query_charts(per_query: Mapping[str, Iterable[float]]) -> list[tuple[str, Markup, str]]:
    """Return name, histogram and note of the main metrics' values per query."""
    names = [*(name for name in METRICS if name in per_query), *(name for name in per_query if name not in METRICS)]
    charts = []
    for name in names[:CHARTS]:
        values = [float(value) for value in per_query[name]]
        if any(map(math.isfinite, values)):
            charts.append((name, *_query_chart(name, values)))
    return charts


def _query_chart(name: str, values: Sequence[float]) -> tuple[Markup, str]:
    finite = [value for value in values if math.isfinite(value)]
    # 1.0 belongs to the last bar instead of one of its own after it.
    counts = binned((min(value, 1 - BAR_WIDTH / 2) if value <= 1 else value for value in finite), BAR_WIDTH)
    zeros, ones = (sum(value == end for value in finite) / len(finite) for end in (0, 1))
    note = f"median {format_metric(statistics.median(finite))}; {zeros:.1%} at 0, {ones:.1%} at 1"
    if len(finite) < len(values):
        note += f"; {len(values) - len(finite):,} not finite"
    return histogram([Bars("queries", counts, "r6")], BAR_WIDTH, name, small=True), note
