"""What a person looks at after tasks of MTEB: their main scores, and all that was measured of each."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from raybge.evaluation.metric_changes import number
from raybge.report.page import cell, duration, page, section, table
from raybge.report.run_details import Run, heading, what_was_run
from raybge.util.atomic_write import written_aside


@dataclass(frozen=True)
class Task:
    """A task that was measured.

    Args:
        name: mteb's.
        kind: "Retrieval", "STS".
        main: what its main score is called, "ndcg_at_10".
        score: the main score, the mean of its splits and subsets.
        parts: split, subset and all scores of each; what is no number is passed over.
        seconds: that it took.
    """

    name: str
    kind: str
    main: str
    score: float
    parts: Sequence[tuple[str, str, Mapping[str, object]]] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """All that the report says."""

    run: Run
    tasks: Sequence[Task]


def write(path: str, report: Measurement) -> None:
    """Write the report; a path or URI."""
    text = html(report).encode()
    with written_aside(path, "--metrics_file") as out:
        out.write(text)


def html(report: Measurement) -> str:
    """The report as a document."""
    tasks = report.tasks
    if len(tasks) == 1:
        title = f"{tasks[0].name}: {tasks[0].main} {number(tasks[0].score)}"
    else:
        title = f"{len(tasks)} tasks of MTEB"
    kinds = {
        kind: [task.score for task in tasks if task.kind == kind] for kind in dict.fromkeys(task.kind for task in tasks)
    }
    means = [(f"mean of {kind}", number(statistics.mean(found))) for kind, found in kinds.items() if len(found) > 1]
    said = [f"{duration(sum(task.seconds for task in tasks))} in all"]
    return page(
        title,
        heading(report.run, title, said, means),
        section("Tasks", "The main score of each, as MTEB's own table has it.", _mains(tasks)),
        section("All scores", "By split and subset.", *(part for task in tasks for part in _parts(task))),
        what_was_run(report.run),
    )


def _mains(tasks: Sequence[Task]) -> str:
    rows = [
        f"<tr>{cell(task.name)}{cell(task.kind)}{cell(task.main)}{cell(number(task.score), 'number')}"
        f"{cell(duration(task.seconds), 'number')}</tr>"
        for task in tasks
    ]
    return table(["task", "kind", "main score", "value", "time"], rows, {"value", "time"})


def _parts(task: Task) -> Iterator[str]:
    """For each split and subset what it is called and a table of its scores."""
    for split, subset, scores in task.parts:
        name = f"{task.name}, {split}" + (f", {subset}" if subset != "default" else "")
        plain = {k: v for k, v in scores.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        rows = [f"<tr>{cell(score)}{cell(number(value), 'number')}</tr>" for score, value in plain.items()]
        yield f"<h3>{escape(name)}</h3>" + table(["score", "value"], rows, {"value"})
