"""Report page of mining, next to the output file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from markupsafe import Markup

from raybge.mining.relabelling import RelabelStatistics
from raybge.mining.statistics import BIN, MiningStatistics
from raybge.report.page import render, write_page
from raybge.report.run_details import RunDetails
from raybge.report.series import Bars, histogram, legend
from raybge.report.text import format_duration
from raybge.util.plural import plural


@dataclass(frozen=True)
class MiningReport:
    """Content of the page.

    Args:
        run: The run's details.
        statistics: Statistics of the rows; None if no negatives were chosen (--score_only).
        number: Requested negatives per row.
        summary: `rows`, `passages`, `duplicates` and `bad_rows`, as far as known.
        seconds: Duration of each stage.
        sampling: Description of how negatives were chosen.
        scored_by: "the cross-encoder" or "the model".
        outcome: What happened to negatives that were taken for positives.
        relabelling: Counts and examples of `--relabel`; None without it.
    """

    run: RunDetails
    statistics: MiningStatistics | None
    number: int = 0
    summary: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    sampling: str = ""
    scored_by: str = "the model"
    outcome: str = ""
    relabelling: RelabelStatistics | None = None


def write(path: str, report: MiningReport) -> None:
    """Write the page to a path or URI."""
    write_page(path, html(report), "--output_file")


def html(report: MiningReport) -> str:
    """Render the page."""
    summary = [f"total time {format_duration(sum(report.seconds.values()))}"] if report.seconds else []
    summary += [report.sampling] if report.sampling else []
    statistics = report.statistics
    return render(
        "mining/page.html.jinja",
        report.run.head(_title(report)),
        report=report,
        statistics=statistics,
        relabelling=report.relabelling,
        summary=summary,
        figures=_figures(report),
        scores_note=_scores_note(report, statistics) if statistics else "",
        scores_chart=_scores_chart(statistics) if statistics else "",
        unranked=_chosen(statistics) - statistics.ranks.total() if statistics else 0,
        ranks_chart=histogram([Bars("negatives", statistics.ranks, "r6")], 1, "rank") if statistics else "",
        incomplete=_incomplete_rows(report, statistics) if statistics else [],
    )


def _title(report: MiningReport) -> str:
    if report.statistics is None:
        return f"{report.summary.get('rows', 0):,} rows with scores"
    return f"{plural(report.statistics.rows, 'row')} with {plural(report.number, 'negative')}"


def _figures(report: MiningReport) -> list[tuple[str, str]]:
    names = {"passages": "passages", "duplicates": "duplicates dropped", "bad_rows": "bad rows skipped"}
    figures = [(text, f"{report.summary[name]:,}") for name, text in names.items() if name in report.summary]
    statistics = report.statistics
    if statistics:
        figures.append(("rows completed with random passages", f"{statistics.rows_filled:,}"))
        figures.append(("rows with fewer negatives", f"{statistics.rows_with_fewer:,}"))
    if statistics and statistics.ranks_rescored:
        share = _share(statistics.ranks_changed, statistics.ranks_rescored)
        figures.append(("ranks that hold another passage in fp32", f"{statistics.ranks_changed:,} ({share})"))
    if (counts := report.relabelling) is not None:
        figures.append(("negatives taken for positives", f"{counts.relabelled:,} of {counts.judged:,}"))
        figures.append(("rows without a judgment", f"{counts.rows_failed:,}"))
    if statistics and statistics.compared:
        share, ends = _share(statistics.above, statistics.compared), statistics.above_interval()
        interval = f", 95% interval {ends[0]:.1%} to {ends[1]:.1%}" if ends[0] < ends[1] else ""
        figures.append(("negatives above their positive", f"{statistics.above:,} ({share}{interval})"))
    return figures


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%"


def _chosen(statistics: MiningStatistics) -> int:
    """Return the number of chosen negatives in all rows."""
    return sum(number * rows for number, rows in statistics.counts.items())


def _scores_note(report: MiningReport, statistics: MiningStatistics) -> str:
    positives, negatives = sum(statistics.positives.values()), sum(statistics.negatives.values())
    note = f"By {report.scored_by}: {positives:,} positives and {negatives:,} chosen negatives, as shares of each kind."
    if not positives:
        note += " The pool contains none of the positives: --keep_scores scores them too."
    unscored = _chosen(statistics) - negatives
    return note + (f" {unscored:,} random negatives were not scored." if unscored > 0 else "")


def _scores_chart(statistics: MiningStatistics) -> Markup:
    groups = [Bars("negatives", statistics.negatives, "r6"), Bars("positives", statistics.positives, "best")]
    chart = histogram(groups, BIN, "score")
    return legend((each.class_, each.name) for each in reversed(groups) if each.total) + chart if chart else chart


def _incomplete_rows(report: MiningReport, statistics: MiningStatistics) -> list[tuple[str, str, str]]:
    """Return, for each number of negatives below the requested one: number, rows and their share."""
    return [
        (str(number), f"{rows:,}", _share(rows, statistics.rows))
        for number, rows in sorted(statistics.counts.items())
        if number < report.number
    ]
