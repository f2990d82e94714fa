"""What a person looks at after an evaluation: `report.html`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from raybge.evaluation.metric_changes import Change, changes_table, number
from raybge.report.page import cell, duration, page, section, table
from raybge.report.run_details import Run, heading, what_was_run
from raybge.report.series import Bars, binned, histogram
from raybge.util.atomic_write import written_aside

MAIN = ("nDCG@10", "MRR@10")  # what a title and the first charts are about, the first of them that is there
CHARTS = 6
WIDTH = 0.05  # of a bar


@dataclass(frozen=True)
class Evaluation:
    """All that the report says.

    Args:
        metrics: means by name, "nDCG@10"; what has no "@" in its name is no metric and stands with the counts.
        per_query: each query's value by metric, as far as they were kept.
        comparison: metrics of another model, `before`, and of this one, `after`.
        compared_with: what the other model is called.
        seconds: of each stage.
    """

    run: Run
    metrics: Mapping[str, float]
    per_query: Mapping[str, Iterable[float]] = field(default_factory=dict)
    comparison: Sequence[Change] = ()
    compared_with: str = "before"
    seconds: Mapping[str, float] = field(default_factory=dict)


def write(path: str, report: Evaluation) -> None:
    """Write the report; a path or URI."""
    text = html(report).encode()
    with written_aside(path, "--metrics_file") as out:
        out.write(text)


def html(report: Evaluation) -> str:
    """The report as a document."""
    measured = {name: value for name, value in report.metrics.items() if "@" in name}
    counts = [(name, f"{value:,}") for name, value in report.metrics.items() if name not in measured]
    main = next((name for name in (*MAIN, *measured) if name in measured), None)
    title = f"{main} {number(measured[main])}" if main else "An evaluation without a metric"
    said = [f"{duration(sum(report.seconds.values()))} in all"] if report.seconds else []
    return page(
        title,
        heading(report.run, title, said, counts),
        section("Metrics", "Means over all queries.", _table(measured)),
        section(
            "Compared",
            f"With {report.compared_with}, the same queries. The interval is that of the difference.",
            changes_table(report.comparison, report.compared_with, "this"),
        ),
        section("Query by query", "How many queries come to which value, in percent.", _charts(report.per_query)),
        what_was_run(report.run),
    )


def _table(measured: Mapping[str, float]) -> str:
    """A row for each kind of metric, a column for each number of ranks."""
    split = {name: name.split("@", 1) for name in measured}
    kinds = dict.fromkeys(kind for kind, _ in split.values())
    ranks = sorted(dict.fromkeys(rank for _, rank in split.values()), key=lambda rank: (len(rank), rank))
    heads = ["metric", *(f"@{rank}" for rank in ranks)]
    rows = []
    for kind in kinds:
        cells = [number(measured.get(f"{kind}@{rank}")) for rank in ranks]
        rows.append(f"<tr>{cell(kind)}{''.join(cell(text, 'number') for text in cells)}</tr>")
    return table(heads, rows, set(heads[1:])) if rows else ""


def _charts(per_query: Mapping[str, Iterable[float]]) -> str:
    names = [*(name for name in MAIN if name in per_query), *(name for name in per_query if name not in MAIN)]
    drawn = [_chart(name, [float(value) for value in per_query[name]]) for name in names[:CHARTS]]
    return f'<div class="small-charts">{"".join(drawn)}</div>' if any(drawn) else ""


def _chart(name: str, values: Sequence[float]) -> str:
    good = [value for value in values if math.isfinite(value)]
    if not good:
        return ""
    # 1.0 is in the last bar, and not in one by itself behind it
    counts = binned((min(value, 1 - WIDTH / 2) if value <= 1 else value for value in good), WIDTH)
    none, all_ = (sum(value == end for value in good) / len(good) for end in (0, 1))
    missing = f"; {len(values) - len(good):,} without a number" if len(good) < len(values) else ""
    note = f"median {number(statistics.median(good))}; {none:.1%} at 0, {all_:.1%} at 1{missing}"
    bars = histogram([Bars("queries", counts, "r6")], WIDTH, name, small=True)
    return f'<div><h3>{escape(name)}</h3>{bars}<p class="note">{note}</p></div>'
