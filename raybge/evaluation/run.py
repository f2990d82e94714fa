"""Evaluation of retrieval: read, encode and search with each model, compare, report.

The steps of `evaluate` follow from top to bottom; `retrieval` measures one model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import EvaluateOptions
from raybge.evaluation import page
from raybge.evaluation.judgments import ModelMetrics
from raybge.evaluation.metric_changes import MetricChange, print_changes
from raybge.evaluation.metrics import CUTOFFS, METRICS
from raybge.evaluation.ranking_examples import RankingExamples, ranking_examples
from raybge.evaluation.retrieval import RetrievalData, evaluate_model, open_data
from raybge.evaluation.significance import Difference, compare
from raybge.evaluation.spec import EvaluationSpec
from raybge.report.page import REPORT, write_or_log
from raybge.report.run_details import RunDetails, library_versions
from raybge.util.atomic_write import open_atomic
from raybge.util.filesystem import append_to_path
from raybge.util.plural import plural

COMPARED = (*METRICS, "Recall@100")  # metrics of a comparison, on the console


@dataclass(frozen=True)
class ModelComparison:
    """A further model of an evaluation, compared with the first one.

    Args:
        metrics: the further model's metrics by name.
        difference: by metric, the first model minus this one, with its 95% interval, wins and losses of the first.
    """

    metrics: Mapping[str, float]
    difference: Mapping[str, Difference]


@dataclass(frozen=True)
class EvaluationResult:
    """Result of `raybge.evaluate_retrieval`.

    Args:
        metrics: the model's metrics by name, such as "nDCG@10", or each MTEB task's main score; empty on a dry run.
        counts: numbers of "queries" and of distinct passages in the "corpus"; empty for MTEB tasks.
        comparison: the models of `compare`, by name.
        report: the page next to `metrics_file`; None without one.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    comparison: Mapping[str, ModelComparison] = field(default_factory=dict)
    report: str | None = None


def evaluate(options: EvaluateOptions, console: Console) -> EvaluationResult:
    """Run the command.

    Args:
        options: the command's options.
        console: the console.

    Returns:
        Metrics, counts and the comparison.

    Raises:
        UserError: invalid flags, files or rows.
    """
    spec = EvaluationSpec.from_options(options)
    if spec.mteb_tasks:
        from raybge.evaluation.mteb import evaluate_tasks

        scores = evaluate_tasks(spec, console)
        return EvaluationResult(scores, report=_report_path(spec) if scores else None)
    with open_data(spec, console) as data:
        results = [evaluate_model(spec, encoder, data, console) for encoder in data.encoders]
        measured = [each.measured for each in results if each.measured and spec.metrics_file]
        examples = ranking_examples(data.store, measured) if measured else None
    if spec.dry_run:
        return EvaluationResult(counts=data.counts)
    _print_metrics(spec, results[0], console)
    comparison = _compare_models(spec, results, console) if len(results) > 1 else {}
    _write_results(spec, data, results, comparison, examples, console)
    return EvaluationResult(results[0].means, data.counts, comparison, _report_path(spec))


def _print_metrics(spec: EvaluationSpec, metrics: ModelMetrics, console: Console) -> None:
    kinds = list(dict.fromkeys(name.split("@")[0] for name in metrics.values))
    cutoffs = [cutoff for cutoff in CUTOFFS if cutoff <= spec.ranking.k]
    rows = [(kind, *(f"{metrics.summary[f'{kind}@{cutoff}']:.4f}" for cutoff in cutoffs)) for kind in kinds]
    console.table(("", *(f"@{cutoff}" for cutoff in cutoffs)), rows)


def _compare_models(
    spec: EvaluationSpec, results: Sequence[ModelMetrics], console: Console
) -> dict[str, ModelComparison]:
    """Compare the first model with each further one, by metric; print the main metrics."""
    first, *others = results
    comparison: dict[str, ModelComparison] = {}
    queries = plural(len(next(iter(first.values.values()))), "query")
    for model, other in zip(spec.models[1:], others, strict=True):
        differences = {name: compare(other.values[name], first.values[name]) for name in other.values}
        comparison[model.name] = ModelComparison(other.means, differences)
        console.info(f"\n{spec.model.name} compared with {model.name}; paired bootstrap over {queries}")
        print_changes(_changes(other, first), console, "other", "this")
    return comparison


def _changes(other: ModelMetrics, first: ModelMetrics) -> list[MetricChange]:
    """Return the main metrics of another model as those before, and of the first model as those after."""
    return [
        MetricChange.from_queries(name, other.values[name], first.values[name])
        for name in COMPARED
        if name in other.values
    ]


def _report_path(spec: EvaluationSpec) -> str | None:
    return append_to_path(spec.metrics_file, f".{REPORT}") if spec.metrics_file else None


def _write_results(
    spec: EvaluationSpec,
    data: RetrievalData,
    results: Sequence[ModelMetrics],
    comparison: Mapping[str, ModelComparison],
    examples: RankingExamples | None,
    console: Console,
) -> None:
    """Write the metrics and, next to them, the report page."""
    summary: dict[str, Any] = dict(results[0].summary)
    if comparison:
        summary["compare"] = {name: asdict(each) for name, each in comparison.items()}
    if spec.metrics_file and (report := _report_path(spec)):
        with open_atomic(spec.metrics_file, "--metrics_file") as out:
            out.write((json.dumps(summary, indent=2) + "\n").encode())
        write_or_log(page.write, report, lambda: _report(spec, data, results, examples))
    for written in filter(None, (spec.metrics_file, spec.run_file)):
        console.info(f"written: {written}")
    if report := _report_path(spec):
        console.info(f"report: {report}")


def _report(
    spec: EvaluationSpec, data: RetrievalData, results: Sequence[ModelMetrics], examples: RankingExamples | None
) -> page.EvaluationReport:
    """Return the page's content; the second model's values are those before."""
    first = results[0]
    surveys = data.search.passages.survey, data.search.queries.survey
    files = [item for survey in surveys for item in survey.rows_by_file().items()]
    return page.EvaluationReport(
        run=RunDetails("evaluate", spec.flags, spec.model.name, files, versions=library_versions()),
        metrics=first.summary,
        per_query=first.values,
        comparison=_changes(results[1], first) if len(results) > 1 else [],
        compared_with=spec.models[1].name if len(spec.models) > 1 else "before",
        seconds=data.clock.seconds,
        examples=examples,
    )
