"""Report page of the demo: `report.html`, with links to the reports of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raybge.evaluation.metric_changes import MetricChange
from raybge.report.page import render, write_page
from raybge.report.run_details import RunDetails
from raybge.report.text import format_duration, format_metric


@dataclass(frozen=True)
class DemoReport:
    """Content of the page.

    Args:
        run: The run's details.
        changes: Metrics before and after training, the main one first.
        seconds: Duration of each stage.
        counts: Number of texts by what they are.
        reports: Name and path, relative to this page, of each stage's report.
    """

    run: RunDetails
    changes: Sequence[MetricChange]
    seconds: Mapping[str, float]
    counts: Mapping[str, int]
    reports: Sequence[tuple[str, str]]


def write(path: str, report: DemoReport) -> None:
    """Write the page to a path."""
    write_page(path, html(report), "--output_dir")


def html(report: DemoReport) -> str:
    """Render the page."""
    main = report.changes[0]
    return render(
        "quickstart/page.html.jinja",
        report.run.head(f"{main.metric} {format_metric(main.before)} → {format_metric(main.after)}"),
        report=report,
        summary=[f"total time {format_duration(sum(report.seconds.values()))}"],
        figures=[(name, f"{value:,}") for name, value in report.counts.items()],
    )
