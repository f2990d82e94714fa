"""Report page of MTEB tasks, next to the metrics file: their main scores, and all scores of each task."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from raybge.report.page import render, write_page
from raybge.report.run_details import RunDetails, short_names
from raybge.report.text import format_duration, format_metric


@dataclass(frozen=True)
class MtebTask:
    """Scores of one task.

    Args:
        name: Name of the task.
        kind: Type of the task, such as "Retrieval" or "STS".
        main: Name of its main score, such as "ndcg_at_10".
        score: The main score, the mean over splits and subsets.
        parts: Split, subset and all scores of each; scores that are not numbers are omitted from the page.
        seconds: Duration of its evaluation.
    """

    name: str
    kind: str
    main: str
    score: float
    parts: Sequence[tuple[str, str, Mapping[str, object]]] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class MtebReport:
    """Content of the page: the run's details and the tasks."""

    run: RunDetails
    tasks: Sequence[MtebTask]


def write(path: str, report: MtebReport) -> None:
    """Write the page to a path or URI."""
    write_page(path, html(report), "--metrics_file")


def html(report: MtebReport) -> str:
    """Render the page."""
    tasks = report.tasks
    title = f"{len(tasks)} MTEB tasks"
    if len(tasks) == 1:
        title = f"{tasks[0].name}: {tasks[0].main} {format_metric(tasks[0].score)}"
    return render(
        "evaluation/mteb_page.html.jinja",
        replace(report.run.head(title), data=short_names([task.name for task in tasks])),
        report=report,
        summary=[f"total time {format_duration(sum(task.seconds for task in tasks))}"],
        figures=_means(tasks),
        main_rows=[
            [task.name, task.kind, task.main, format_metric(task.score), format_duration(task.seconds)]
            for task in tasks
        ],
        parts=[part for task in tasks for part in _score_tables(task)],
    )


def _means(tasks: Sequence[MtebTask]) -> list[tuple[str, str]]:
    """Return the mean main score of each kind that has several tasks."""
    scores: dict[str, list[float]] = {}
    for task in tasks:
        scores.setdefault(task.kind, []).append(task.score)
    return [
        (f"mean of {kind}", format_metric(statistics.mean(values)))
        for kind, values in scores.items()
        if len(values) > 1
    ]


def _score_tables(task: MtebTask) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return heading and rows (score, value) of each split and subset."""
    tables = []
    for split, subset, scores in task.parts:
        heading = f"{task.name}, {split}" + (f", {subset}" if subset != "default" else "")
        numbers = {k: v for k, v in scores.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        tables.append((heading, [(name, format_metric(value)) for name, value in numbers.items()]))
    return tables
