"""Report page of a training run: `report.html` next to the model.

Worker 0 writes it at the end of the run: a run's measurements never leave the process that made them, except for the
texts of the example passages (`RetrievalValidator.examples`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from raybge.evaluation.metric_changes import MetricChange, changes_in
from raybge.evaluation.metrics import retrieval_metrics
from raybge.evaluation.query_examples import METRIC, QueryExample
from raybge.evaluation.weight_versions import WeightVersion, versions_in, versions_table
from raybge.losses.negative_counts import CLOSE
from raybge.report.page import REPORT, render, write_or_log, write_page
from raybge.report.run_details import RunDetails
from raybge.report.series import Bars, bin_width, binned, curve, histogram, legend, small_curve
from raybge.report.text import format_duration, format_metric, format_value
from raybge.training.measurements import BatchScores, NegativeCounts, UpdateSpan
from raybge.util.plural import plural, plural_noun

if TYPE_CHECKING:
    from raybge.training.trainer import StreamTrainer
    from raybge.training.worker_config import WorkerConfig


@dataclass(frozen=True)
class TrainingReport:
    """Content of the page.

    Args:
        run: The run's details.
        spans: The updates.
        evaluations: Step and metrics of each evaluation.
        changes: Metrics before and after training.
        scores: Scores of the first and of the last step.
        examples: Held-out queries, in the order in which the page shows them.
        rows: Name of the training rows, such as "groups".
        workers: Number of workers.
        start: Updates that were complete when this run resumed from a checkpoint.
        metrics: The Trainer's metrics, such as `train_runtime`.
        versions: Evaluations of the last and of averaged weights.
        negatives: Counts of negatives in some steps.
    """

    run: RunDetails
    spans: Sequence[UpdateSpan] = ()
    evaluations: Sequence[tuple[int, Mapping[str, float]]] = ()
    changes: Sequence[MetricChange] = ()
    scores: Sequence[BatchScores] = ()
    examples: Sequence[QueryExample] = ()
    rows: str = "groups"
    workers: int = 1
    start: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Sequence[WeightVersion] = ()
    negatives: Sequence[NegativeCounts] = ()


# --- collect ----------------------------------------------------------------------------------------------------------


def write_report(
    folder: Path,
    config: WorkerConfig,
    trainer: StreamTrainer,
    metrics: Mapping[str, Any],
    examples: Sequence[QueryExample],
) -> None:
    """Write REPORT into `folder`; an error is logged and ends there."""
    write_or_log(write, str(folder / REPORT), partial(collect_report, config, trainer, metrics, examples))


def collect_report(
    config: WorkerConfig, trainer: StreamTrainer, metrics: Mapping[str, Any], examples: Sequence[QueryExample]
) -> TrainingReport:
    """Collect the page's content from a trainer at the end of its run.

    Args:
        config: The worker's configuration.
        trainer: The trainer.
        metrics: The Trainer's metrics, and the changes of the retrieval metrics.
        examples: Held-out queries to show.

    Returns:
        The content.
    """
    trainer.step_metrics.resolve()
    spans = trainer.step_metrics.spans
    logged = [(int(entry["step"]), retrieval_metrics(entry)) for entry in trainer.state.log_history]
    evaluations = [(step, values) for step, values in logged if values]
    return TrainingReport(
        run=_run_details(config, trainer),
        spans=spans,
        evaluations=evaluations,
        changes=changes_in(metrics),
        scores=trainer.score_sampler.samples,
        examples=examples,
        rows=plural_noun(config.task.spec.row_noun),
        workers=trainer.stream.world,
        start=spans[0].first - 1 if spans else 0,
        metrics=metrics,
        versions=versions_in(metrics),
        negatives=trainer.score_sampler.negatives(),
    )


def _run_details(config: WorkerConfig, trainer: StreamTrainer) -> RunDetails:
    card, order = config.card, config.order
    facts = {
        "rows per epoch": f"{order.total:,}",
        f"{plural_noun(config.task.spec.row_noun)} per step": f"{order.global_batch:,}",
        "steps per epoch": f"{order.steps:,}",
        "device": str(trainer.args.device),
    }
    if config.validation:
        corpus = config.validation.corpus
        facts["held-out queries"] = f"{config.validation.queries.total_rows:,}"
        facts["evaluation corpus"] = f"{corpus.total_rows:,} passages" if corpus else "passages of these queries"
    return RunDetails(
        config.task.spec.command,
        config.flags,
        config.task.spec.base_model or "from scratch",
        card["data"],
        facts,
        card["versions"],
    )


# --- page -------------------------------------------------------------------------------------------------------------


def write(path: str, report: TrainingReport) -> None:
    """Write the page to a path or URI."""
    write_page(path, html(report), "--output_dir")


def html(report: TrainingReport) -> str:
    """Render the page."""
    return render(
        "training/page.html.jinja",
        report.run.head(_title(report)),
        report=report,
        summary=_summary(report),
        figures=_figures(report),
        queries=next((change.queries for change in report.changes if change.queries), None),
        evaluation_charts=_evaluation_charts(report),
        versions=versions_table(report.versions),
        loss_note=_loss_note(report),
        loss_chart=curve([(span.middle, span.loss) for span in report.spans], "loss", trend=True),
        run_charts=_run_charts(report.spans),
        negatives_note=_negatives_note(report.negatives),
        negatives_charts=_negatives_charts(report.negatives),
        score_legend=_score_legend(report.scores),
        score_charts=_score_charts(report.scores),
        metric=METRIC,
    )


def _title(report: TrainingReport) -> str:
    main = next((c for c in report.changes if c.metric == METRIC), next(iter(report.changes), None))
    if main and main.after is not None:
        before = f"{format_metric(main.before)} → " if main.before is not None else ""
        return f"{main.metric} {before}{format_metric(main.after)}"
    losses = [span.loss for span in report.spans if math.isfinite(span.loss)]
    if not losses:
        return "Training run without a loss"
    part = max(1, len(losses) // 20)
    return f"Loss {format_metric(statistics.fmean(losses[:part]))} → {format_metric(statistics.fmean(losses[-part:]))}"


def _summary(report: TrainingReport) -> list[str]:
    summary = [plural(sum(span.updates for span in report.spans), "step")]
    if (seconds := report.metrics.get("train_runtime")) is not None:
        summary.append(f"{format_duration(seconds)} of training")
    summary.append(plural(report.workers, "worker"))
    if report.start:
        summary.append(f"resumed after {report.start:,} steps: curves start there")
    return summary


def _figures(report: TrainingReport) -> list[tuple[str, str]]:
    metrics = report.metrics
    figures = []
    if "train_samples_per_second" in metrics:
        figures.append((f"{report.rows} per second", format_value(float(metrics["train_samples_per_second"]))))
    if times := [span.seconds / span.updates for span in report.spans]:
        name = "median step time" if _span_size(report.spans) == 1 else "median of mean step times"
        figures.append((name, format_duration(statistics.median(times))))
    if "train_loss" in metrics:
        figures.append(("mean loss", format_metric(metrics["train_loss"])))
    if "epoch" in metrics:
        figures.append(("epochs", format_value(float(metrics["epoch"]))))
    return figures


def _evaluation_charts(report: TrainingReport) -> list[Markup]:
    """Draw the metrics over the steps, if there are more evaluations than the first and the last."""
    if len(report.evaluations) < 3:
        return []
    names = dict.fromkeys(name for _, metrics in report.evaluations for name in metrics)
    return [small_curve([(s, m[name]) for s, m in report.evaluations if name in m], name) for name in names]


def _loss_note(report: TrainingReport) -> str:
    missing = sum(not math.isfinite(span.loss) for span in report.spans if span.queries)
    own = "queries" if report.rows == "groups" else report.rows
    size = _span_size(report.spans)
    note = f"Mean loss of one worker's {own} " + ("at each step." if size <= 1 else f"in up to {size} steps per value.")
    if len(report.spans) > 20:
        note += " Pale: the values; dark: their moving mean."
    unit = "step" if size <= 1 else "value"
    return note + (f" The loss of {plural(missing, unit)} is not finite." if missing else "")


def _span_size(spans: Sequence[UpdateSpan]) -> int:
    """Return the most steps that one value of the charts stands for: more than 1 in long runs."""
    return max((span.updates for span in spans), default=0)


def _run_charts(spans: Sequence[UpdateSpan]) -> list[Markup]:
    timed = [span for span in spans if span.seconds > 0]
    return [
        small_curve([(s.middle, s.norm) for s in spans], "gradient norm"),
        small_curve([(s.middle, s.rate) for s in spans], "learning rate"),
        small_curve([(s.middle, s.seconds / s.updates) for s in timed], "seconds per step", steady=True),
        small_curve([(s.middle, s.tokens / s.seconds) for s in timed], "tokens per second", steady=True),
    ]


# --- negatives --------------------------------------------------------------------------------------------------------

# Name, reason and count of each kind of negative that the page shows.
_NEGATIVES: Sequence[tuple[str, str, Callable[[NegativeCounts], int]]] = (
    ("known positives", "masked because a row states them to be relevant to the query", lambda counts: counts.known),
    ("likely positives", "masked by --false_negative_margin", lambda counts: counts.likely),
    ("close", f"used, with a cosine above that of the positive minus {CLOSE:g}", lambda counts: counts.close),
)


def _negatives_note(negatives: Sequence[NegativeCounts]) -> str:
    total = sum(counts.total for counts in negatives)
    if not total:
        return ""
    shares = [f"{name}: {sum(map(count_of, negatives)) / total:.2%}, {reason}" for name, reason, count_of in _NEGATIVES]
    return (
        "Pairs of one worker's queries with the passages that are their negatives, those of other workers included, in "
        f"{plural(len(negatives), 'step')}: {total / len(negatives):,.0f} a step. Shares: {'; '.join(shares)}."
    )


def _negatives_charts(negatives: Sequence[NegativeCounts]) -> list[Markup]:
    """Draw the share of each kind of negative over the steps; none where it is 0 throughout."""
    return [
        small_curve([(counts.step, count_of(counts) / counts.total) for counts in negatives], f"share {name}")
        for name, _, count_of in _NEGATIVES
        if any(map(count_of, negatives))
    ]


# --- scores -----------------------------------------------------------------------------------------------------------

_KINDS: Sequence[tuple[str, str, Callable[[BatchScores], Sequence[float]]]] = (
    ("other groups' passages", "none", lambda scores: scores.others),
    ("own negatives", "r6", lambda scores: scores.negatives),
    ("positives", "best", lambda scores: scores.positives),
)


def _score_legend(scores: Sequence[BatchScores]) -> Markup:
    """Build the legend of the kinds of which there are finite scores."""
    kinds = [(class_, name) for name, class_, values_of in _KINDS if any(_finite(values_of(each)) for each in scores)]
    return legend(reversed(kinds))


def _score_charts(scores: Sequence[BatchScores]) -> list[tuple[int, Markup, str]]:
    """Return number, histogram and means of each step that has finite scores."""
    width = bin_width(value for each in scores for _, _, values_of in _KINDS for value in values_of(each))
    groups = [
        [Bars(name, binned(values_of(each), width), class_) for name, class_, values_of in _KINDS] for each in scores
    ]
    all_bars = [bars for each in groups for bars in each]
    return [
        (each.step, histogram(bars, width, "score", small=True, like=all_bars), _score_means(each))
        for each, bars in zip(scores, groups, strict=True)
        if any(b.total for b in bars)
    ]


def _score_means(scores: BatchScores) -> str:
    means = [
        f"{name} {format_metric(statistics.fmean(finite))}"
        for name, _, values_of in reversed(_KINDS)
        if (finite := _finite(values_of(scores)))
    ]
    return ", ".join(means)


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
