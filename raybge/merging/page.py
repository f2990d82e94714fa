"""Report page of merging: `report.html` in the merged model's folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from raybge.merging.spec import METRIC
from raybge.merging.weight_search import MergeCandidate
from raybge.report.charts import Frame, bottom_axis, clipped, left_axis, line, mark, svg, text_label
from raybge.report.page import render, write_page
from raybge.report.run_details import RunDetails, short_names
from raybge.report.scales import Scale, tick_range
from raybge.report.series import NARROW, TICKS, WIDE, chart
from raybge.report.text import distinct_labels, format_duration, format_metric

NAME_LENGTH = 40  # characters of a model's name in a chart and in the heads of a table


@dataclass(frozen=True)
class MergingReport:
    """Content of the page.

    Args:
        run: The run's details.
        models: The source models.
        weights: One weight per model.
        method: Merge method.
        losses: Loss of each model on the examples; empty if the weights have another origin.
        candidates: Candidates that a search evaluated, in its order; empty without a search.
        general_threshold: Minimum of the metric on the general set; None without one.
        metric: Metric of the search.
        seconds: Duration of the run.
    """

    run: RunDetails
    models: Sequence[str]
    weights: Sequence[float]
    method: str = "linear"
    losses: Sequence[float] = ()
    candidates: Sequence[MergeCandidate] = ()
    general_threshold: float | None = None
    metric: str = METRIC
    seconds: float = 0.0

    @property
    def selected(self) -> MergeCandidate | None:
        """The candidate with the weights of the merged model; None without a search."""
        return next((each for each in self.candidates if list(each.weights) == list(self.weights)), None)


def write(path: str, report: MergingReport) -> None:
    """Write the page to a path or URI."""
    write_page(path, html(report), "--output_path")


def html(report: MergingReport) -> str:
    """Render the page."""
    return render(
        "merging/page.html.jinja",
        replace(report.run.head(f"Merge of {len(report.models)} models"), model=short_names(report.models)),
        report=report,
        summary=[f"method: {report.method}", f"total time {format_duration(report.seconds)}"],
        figures=_figures(report),
        weight_rows=_weight_rows(report),
        tradeoff_note=_tradeoff_note(report),
        tradeoff_chart=_tradeoff_chart(report),
        candidate_heads=_candidate_heads(report),
        candidate_rows=_candidate_rows(report),
    )


def _figures(report: MergingReport) -> list[tuple[str, str]]:
    selected = report.selected
    if selected is None:
        return []
    figures = [(f"{report.metric} on the target set", format_metric(selected.target))]
    if selected.general is not None:
        figures.append((f"{report.metric} on the general set", format_metric(selected.general)))
    return [*figures, ("candidates evaluated", f"{len(report.candidates):,}")]


def _weight_rows(report: MergingReport) -> list[tuple[str, list[str]]]:
    """Return each model with its weight and, if known, its loss."""
    columns = [report.weights, *([report.losses] if report.losses else [])]
    numbers = [[format_metric(value) for value in row] for row in zip(*columns, strict=True)]
    return list(zip(report.models, numbers, strict=True))


def _candidate_heads(report: MergingReport) -> list[str]:
    weights = [f"weight of {label}" for label in distinct_labels(report.models, NAME_LENGTH)]
    return [*weights, "target", *(["general"] if _has_general(report) else [])]


def _candidate_rows(report: MergingReport) -> list[tuple[bool, list[str]]]:
    """Return for each candidate if it is the selected one, and its numbers; the best on the target set first."""
    rows = []
    for each in sorted(report.candidates, key=lambda each: -each.target):
        numbers = [*each.weights, each.target, *([each.general] if _has_general(report) else [])]
        rows.append((each is report.selected, [format_metric(number) for number in numbers]))
    return rows


def _has_general(report: MergingReport) -> bool:
    return any(each.general is not None for each in report.candidates)


# --- target against general set ---------------------------------------------------------------------------------------


def _tradeoff_note(report: MergingReport) -> str:
    note = f"{report.metric} of each candidate; up and right is better."
    if len(report.models) == 2:
        note += " The line leads from one model alone to the other."
    if report.general_threshold is not None:
        note += f" The search required at least {format_metric(report.general_threshold)} on the general set."
    return note


def _tradeoff_chart(report: MergingReport) -> Markup:
    """Draw the target metric over the general one; nothing without a general set."""
    points = [
        each for each in report.candidates if each.general is not None and math.isfinite(each.general + each.target)
    ]
    if not points:
        return Markup("")
    return chart(_draw_tradeoff(report, points, WIDE), _draw_tradeoff(report, points, NARROW))


def _draw_tradeoff(report: MergingReport, points: Sequence[MergeCandidate], width: float) -> Markup:
    height = 420.0 if width == WIDE else 340.0
    frame = Frame(66, 34, width - 22, height - 50)
    threshold = report.general_threshold
    thresholds = [threshold] if threshold is not None and math.isfinite(threshold) else []
    general = [_general(each) for each in points] + thresholds
    x = Scale(*tick_range(min(general), max(general), TICKS), frame.left, frame.right)
    target = [each.target for each in points]
    y = Scale(*tick_range(min(target), max(target), TICKS), frame.bottom, frame.top)
    lines = [
        line([(x(value), frame.top), (x(value), frame.bottom)], "middle", f"at least {format_metric(value)}")
        for value in thresholds
    ]
    if len(report.models) == 2:
        path = [(x(_general(each)), y(each.target)) for each in sorted(points, key=lambda each: each.weights)]
        lines.append(line(path, "curve r4"))
    marks = [
        mark(
            "dot",
            x(_general(each)),
            y(each.target),
            "best" if each is report.selected else "r6",
            _tooltip(report, each),
        )
        for each in sorted(points, key=lambda each: each is report.selected)  # the selected one on top
    ]
    axes = bottom_axis(x, frame, f"{report.metric}, general set", int((frame.right - frame.left) / 62))
    axes += left_axis(y, frame, f"{report.metric}, target set", TICKS)
    label = f"{report.metric} of {len(points)} candidates: target set against general set"
    name_length = NAME_LENGTH if width == WIDE else NAME_LENGTH // 2
    names = _model_labels(report, points, x, y, frame, name_length)
    return svg(width, height, label, axes, clipped(frame.padded(6), *lines, *marks), *names)


def _model_labels(
    report: MergingReport, points: Sequence[MergeCandidate], x: Scale, y: Scale, frame: Frame, name_length: int
) -> list[Markup]:
    """Label the candidates that are one model alone."""
    names = distinct_labels(report.models, name_length)
    labels = []
    for each in points:
        if max(each.weights) == 1:
            at = x(_general(each)), y(each.target)
            anchor, offset = ("end", -8) if at[0] > (frame.left + frame.right) / 2 else ("start", 8)
            labels.append(text_label(at[0] + offset, at[1] - 8, names[each.weights.index(1)], "halo", anchor))
    return labels


def _general(candidate: MergeCandidate) -> float:
    return float(candidate.general or 0)


def _tooltip(report: MergingReport, each: MergeCandidate) -> str:
    weights = [f"{model}: {weight:g}" for model, weight in zip(report.models, each.weights, strict=True)]
    metrics = f"target {format_metric(each.target)}, general {format_metric(each.general)}"
    return "\n".join([*weights, metrics, *(["selected"] if each is report.selected else [])])
