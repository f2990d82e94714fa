"""Evaluation of retrieval: read, encode and search with each model, compare, report.

The steps of `evaluate` follow from top to bottom; `retrieval` measures one model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import EvaluateOptions
from raybge.evaluation import page
from raybge.evaluation.judgments import ModelMetrics
from raybge.evaluation.metric_changes import MetricChange
from raybge.evaluation.metrics import CUTOFFS, METRICS
from raybge.evaluation.ranking_examples import RankingExamples, ranking_examples
from raybge.evaluation.retrieval import RetrievalData, evaluate_model, open_data
from raybge.evaluation.significance import LEVEL, compare
from raybge.evaluation.spec import EvaluationSpec
from raybge.report.page import REPORT, write_or_log
from raybge.report.run_details import RunDetails, library_versions
from raybge.util.atomic_write import open_atomic
from raybge.util.filesystem import append_to_path

COMPARED = (*METRICS, "Recall@100")  # metrics of a comparison, on the console


def evaluate(options: EvaluateOptions, console: Console) -> dict[str, Any]:
    """Run the command.

    Args:
        options: the command's options.
        console: the console.

    Returns:
        The metrics by name, and the numbers of queries and passages; with --compare also the comparison.

    Raises:
        UserError: invalid flags, files or rows.
    """
    spec = EvaluationSpec.from_options(options)
    if spec.mteb_tasks:
        from raybge.evaluation.mteb import evaluate_tasks

        return evaluate_tasks(spec, console)
    with open_data(spec, console) as data:
        results = [evaluate_model(spec, model.encoder, data, console) for model in spec.models]
        measured = [each.measured for each in results if each.measured and spec.metrics_file]
        examples = ranking_examples(data.store, measured) if measured else None
    if spec.dry_run:
        return dict(data.counts)
    summary = results[0].summary
    _print_metrics(spec, results[0], console)
    if len(results) > 1:
        summary["compare"] = _compare_models(spec, results, console)
    _write_results(spec, data, results, examples, console)
    return summary


def _print_metrics(spec: EvaluationSpec, metrics: ModelMetrics, console: Console) -> None:
    kinds = list(dict.fromkeys(name.split("@")[0] for name in metrics.values))
    cutoffs = [cutoff for cutoff in CUTOFFS if cutoff <= spec.k]
    rows = [(kind, *(f"{metrics.summary[f'{kind}@{cutoff}']:.4f}" for cutoff in cutoffs)) for kind in kinds]
    console.table(("", *(f"@{cutoff}" for cutoff in cutoffs)), rows)


def _compare_models(spec: EvaluationSpec, results: Sequence[ModelMetrics], console: Console) -> dict[str, Any]:
    """Compare each further model with the first, by metric; print the main metrics."""
    first, *others = results
    comparison: dict[str, Any] = {}
    rows = []
    for model, other in zip(spec.models[1:], others, strict=True):
        differences = {name: compare(first.values[name], other.values[name]) for name in other.values}
        comparison[model.name] = {
            "metrics": {name: value for name, value in other.summary.items() if "@" in name},
            "difference": {name: asdict(each) for name, each in differences.items()},
        }
        for name in COMPARED:
            if name in first.values:
                d = differences[name]
                interval = f"{d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
                rows.append((model.name, name, f"{other.summary[name]:.4f}", interval, f"{d.wins:,}", f"{d.losses:,}"))
    console.info(f"\ndifference from the first model, with {LEVEL:.0%} intervals (paired bootstrap over the queries)")
    console.table(("model", "metric", "value", "difference", "better", "worse"), rows)
    return comparison


def _write_results(
    spec: EvaluationSpec,
    data: RetrievalData,
    results: Sequence[ModelMetrics],
    examples: RankingExamples | None,
    console: Console,
) -> None:
    """Write the metrics and, next to them, the report page."""
    if spec.metrics_file:
        with open_atomic(spec.metrics_file, "--metrics_file") as out:
            out.write((json.dumps(results[0].summary, indent=2) + "\n").encode())
        path = append_to_path(spec.metrics_file, f".{REPORT}")
        write_or_log(page.write, path, lambda: _report(spec, data, results, examples))
    for written in filter(None, (spec.metrics_file, spec.run_file)):
        console.info(f"written: {written}")


def _report(
    spec: EvaluationSpec, data: RetrievalData, results: Sequence[ModelMetrics], examples: RankingExamples | None
) -> page.EvaluationReport:
    """Return the page's content; the second model's values are those before."""
    first = results[0]
    other = results[1].values if len(results) > 1 else {}
    surveys = data.search.passages.survey, data.search.queries.survey
    files = [item for survey in surveys for item in survey.rows_by_file().items()]
    return page.EvaluationReport(
        run=RunDetails("evaluate", spec.flags, spec.model.name, files, versions=library_versions()),
        metrics={name: value for name, value in first.summary.items() if name != "compare"},
        per_query=first.values,
        comparison=[
            MetricChange.from_queries(name, other[name], first.values[name]) for name in COMPARED if name in other
        ],
        compared_with=spec.models[1].name if len(spec.models) > 1 else "before",
        seconds=data.clock.seconds,
        examples=examples,
    )
