"""What a person looks at after the demo: `report.html`, which leads to the reports of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from raybge.evaluation.metric_changes import Change, changes_table, number
from raybge.report.page import cell, duration, page, section, table
from raybge.report.run_details import Run, heading, what_was_run
from raybge.util.atomic_write import written_aside


@dataclass(frozen=True)
class Demo:
    """All that the report says.

    Args:
        changes: metrics before training and after it, the main one first.
        seconds: of each stage.
        counts: of texts, by what they are.
        reports: name and place of each stage's own report, relative to this one.
    """

    run: Run
    changes: Sequence[Change]
    seconds: Mapping[str, float]
    counts: Mapping[str, int]
    reports: Sequence[tuple[str, str]]


def write(path: str, demo: Demo) -> None:
    """Write the report."""
    text = html(demo).encode()
    with written_aside(path, "--output_dir") as out:
        out.write(text)


def html(demo: Demo) -> str:
    """The report as a document."""
    main = demo.changes[0]
    title = f"{main.metric} {number(main.before)} → {number(main.after)}"
    times = [f"<tr>{cell(name)}{cell(duration(value), 'number')}</tr>" for name, value in demo.seconds.items()]
    links = "".join(f'<li><a href="{escape(place)}">{escape(name)}</a></li>' for name, place in demo.reports)
    said = [f"{duration(sum(demo.seconds.values()))} in all"]
    counts = [(name, f"{value:,}") for name, value in demo.counts.items()]
    return page(
        title,
        heading(demo.run, title, said, counts),
        section("Metrics", "Of the held-out questions, searched in all passages.", changes_table(demo.changes)),
        section("More", "The reports of the stages.", f"<ul>{links}</ul>" if links else ""),
        section("Time", "", table(["stage", "time"], times, {"time"})),
        what_was_run(demo.run),
    )
