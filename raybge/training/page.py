"""What a person looks at after a training run: `report.html` beside the model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from raybge.evaluation.metric_changes import Change, changes_table, number
from raybge.evaluation.query_examples import METRIC, Hit, Shown
from raybge.report.charts import short
from raybge.report.page import cut, duration, page, section
from raybge.report.run_details import Run, heading, what_was_run
from raybge.report.series import Bars, bin_width, binned, curve, histogram, legend, small_curve
from raybge.training.step_metrics import BatchScores, Span
from raybge.util.atomic_write import written_aside


@dataclass(frozen=True)
class Training:
    """All that the report says.

    Args:
        spans: the updates.
        evaluations: step and metrics of each evaluation.
        changes: metrics before training and after it.
        scores: those of the first and the last step.
        shown: held-out queries, in the order in which they are to be seen.
        rows: what was trained on.
        workers: how many trained.
        start: updates that were done when this run continued from a checkpoint.
        metrics: the Trainer's, such as train_runtime.
    """

    run: Run
    spans: Sequence[Span] = ()
    evaluations: Sequence[tuple[int, Mapping[str, float]]] = ()
    changes: Sequence[Change] = ()
    scores: Sequence[BatchScores] = ()
    shown: Sequence[Shown] = ()
    rows: str = "groups"
    workers: int = 1
    start: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


def write(path: str, training: Training) -> None:
    """Write the report; a path or URI."""
    text = html(training).encode()
    with written_aside(path, "--output_dir") as out:
        out.write(text)


def html(training: Training) -> str:
    """The report as a document."""
    title = _title(training)
    return page(
        title,
        heading(training.run, title, _said(training), _figures(training)),
        section("Metrics", _metrics_note(training), changes_table(training.changes), _evaluations(training)),
        section("Loss", _loss_note(training), curve([(s.middle, s.loss) for s in training.spans], "loss", trend=True)),
        section("The run", _run_note(training), _run_charts(training.spans)),
        section("Scores", _scores_note(training), _scores(training.scores)),
        section("Held-out queries", _queries_note(training.shown), *map(_query, training.shown)),
        what_was_run(training.run),
    )


# --- heading ----------------------------------------------------------------------------------------------------------


def _title(training: Training) -> str:
    main = next((c for c in training.changes if c.metric == METRIC), next(iter(training.changes), None))
    if main and main.after is not None:
        gone = f"{number(main.before)} → " if main.before is not None else ""
        return f"{main.metric} {gone}{number(main.after)}"
    losses = [span.loss for span in training.spans if math.isfinite(span.loss)]
    if not losses:
        return "A training run without a loss"
    part = max(1, len(losses) // 20)
    return f"Loss {number(statistics.fmean(losses[:part]))} → {number(statistics.fmean(losses[-part:]))}"


def _said(training: Training) -> list[str]:
    updates = sum(span.updates for span in training.spans)
    said = [f"{updates:,} step{'s' * (updates != 1)}"]
    if (seconds := training.metrics.get("train_runtime")) is not None:
        said.append(f"{duration(seconds)} of training")
    said.append(f"{training.workers:,} worker{'s' * (training.workers != 1)}")
    if training.start:
        said.append(f"continued after {training.start:,} steps: curves begin there")
    return said


def _figures(training: Training) -> list[tuple[str, str]]:
    metrics = training.metrics
    found = []
    if "train_samples_per_second" in metrics:
        found.append((f"{training.rows} a second", short(float(metrics["train_samples_per_second"]))))
    if times := [span.seconds / span.updates for span in training.spans]:
        found.append(("a step, median", duration(statistics.median(times))))
    if "train_loss" in metrics:
        found.append(("mean loss", number(metrics["train_loss"])))
    if "epoch" in metrics:
        found.append(("epochs", short(float(metrics["epoch"]))))
    return found


# --- metrics ----------------------------------------------------------------------------------------------------------


def _metrics_note(training: Training) -> str:
    if not training.changes:
        return ""
    queries = next((c.queries for c in training.changes if c.queries), None)
    if queries:
        return (
            f"Of the {queries:,} held-out queries of --eval_data. The interval of the difference: 95% of 1,000 times "
            "the same number of queries drawn anew from these (paired bootstrap)."
        )
    return "Of the held-out queries of --eval_data. " + (
        "What the model measured before training was not kept query by query: there is no interval."
    )


def _evaluations(training: Training) -> str:
    """The metrics over the steps, where there is more to see than before and after."""
    if len(training.evaluations) < 3:
        return ""
    names = dict.fromkeys(name for _, metrics in training.evaluations for name in metrics)
    drawn = [small_curve([(s, m[name]) for s, m in training.evaluations if name in m], name) for name in names]
    return f'<div class="small-charts">{"".join(drawn)}</div>'


# --- curves -----------------------------------------------------------------------------------------------------------


def _loss_note(training: Training) -> str:
    missing = sum(not math.isfinite(span.loss) for span in training.spans if span.queries)
    own = "queries" if training.rows == "groups" else training.rows
    note = f"Mean loss of a worker's own {own} at each step."
    if len(training.spans) > 20:
        note += " Pale: the values; dark: their moving mean."
    return note + (f" {missing:,} have no loss that is a number." if missing else "")


def _run_note(training: Training) -> str:
    note = "Without the time of evaluations and checkpoints; the first step also waits for the first rows."
    return note + (f" Tokens are those of one of {training.workers} workers." if training.workers > 1 else "")


def _run_charts(spans: Sequence[Span]) -> str:
    timed = [span for span in spans if span.seconds > 0]
    drawn = [
        small_curve([(s.middle, s.rate) for s in spans], "learning rate"),
        small_curve([(s.middle, s.seconds / s.updates) for s in timed], "seconds a step", steady=True),
        small_curve([(s.middle, s.tokens / s.seconds) for s in timed], "tokens a second", steady=True),
    ]
    return f'<div class="small-charts">{"".join(drawn)}</div>' if any(drawn) else ""


# --- scores -----------------------------------------------------------------------------------------------------------

_KINDS: Sequence[tuple[str, str, Callable[[BatchScores], Sequence[float]]]] = (
    ("other groups' passages", "none", lambda scores: scores.others),
    ("own negatives", "r6", lambda scores: scores.negatives),
    ("positives", "best", lambda scores: scores.positives),
)


def _scores_note(training: Training) -> str:
    return (
        "Inner products of queries and passages in one worker's share of the first and of the last step of this run, "
        "as training saw them (with dropout, where the model has it): at most 2,000 of each kind, each kind's shares "
        "by themselves. Copies of a positive are left out."
    )


def _scores(scores: Sequence[BatchScores]) -> str:
    values = [value for each in scores for _, _, of in _KINDS for value in of(each)]
    width = bin_width(values)
    groups = [[Bars(name, binned(of(each), width), class_) for name, class_, of in _KINDS] for each in scores]
    every = [bars for each in groups for bars in each]
    drawn = [
        f"<div><h3>Step {each.step:,}</h3>{histogram(bars, width, 'score', small=True, like=every)}{_means(each)}</div>"
        for each, bars in zip(scores, groups, strict=True)
        if any(b.total for b in bars)
    ]
    if not drawn:
        return ""
    there = [(bars.class_, bars.name) for bars in groups[-1] if any(b.total for b in every if b.name == bars.name)]
    return legend(reversed(there)) + f'<div class="small-charts">{"".join(drawn)}</div>'


def _means(scores: BatchScores) -> str:
    said = []
    for name, _, of in reversed(_KINDS):
        if good := [value for value in of(scores) if math.isfinite(value)]:
            said.append(f"{name} {number(statistics.fmean(good))}")
    return f'<p class="note">Means: {escape(", ".join(said))}</p>' if said else ""


# --- queries ----------------------------------------------------------------------------------------------------------


def _queries_note(shown: Sequence[Shown]) -> str:
    return (
        f"{len(shown)} of them, the largest gains and losses of {METRIC} first: the passages that each found before "
        "training and after it. ✓ is an answer."
    )


def _query(shown: Shown) -> str:
    gap = shown.after - shown.before
    said = f"{METRIC} {number(shown.before)} → {number(shown.after)}"
    ranks = f"answer at rank {_rank(shown.rank_before)} → {_rank(shown.rank_after)}"
    kind = "gain" if gap > 0 else "loss" if gap < 0 else "same"
    return (
        f'<article class="query"><h3>{escape(cut(shown.query))}</h3>'
        f'<p class="note"><span class="{kind}">{gap:+.4f}</span> · {escape(said)} · {escape(ranks)}</p>'
        f'<p class="answer"><b>answer:</b> {escape(cut(shown.answer))}</p>'
        f'<div class="sides">{_hits("before", shown.hits_before)}{_hits("after", shown.hits_after)}</div></article>'
    )


def _rank(rank: int | None) -> str:
    return "beyond 10" if rank is None else str(rank)


def _hits(when: str, hits: Sequence[Hit]) -> str:
    items = "".join(
        f"<li{' class=right' if hit.right else ''}>{'✓ ' if hit.right else ''}{escape(cut(hit.text))}</li>"
        for hit in hits
    )
    return f"<div><h4>{when}</h4><ol>{items}</ol></div>"
