"""The report of a training run, from what worker 0 knows at its end.

It writes the report beside the model: what a run measures of itself never leaves the process that measured it, but for
the texts of the passages that are shown (`Validation.shown`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raybge.evaluation.metric_changes import Change, change
from raybge.evaluation.query_examples import Shown
from raybge.report.page import written
from raybge.report.run_details import Run
from raybge.training.page import Training, write
from raybge.training.trainer import StreamTrainer
from raybge.training.worker_config import WorkerConfig

REPORT = "report.html"


def write_report(
    folder: Path, config: WorkerConfig, trainer: StreamTrainer, metrics: Mapping[str, Any], shown: Sequence[Shown]
) -> None:
    """Write REPORT into `folder`, or say in the log what kept it from being written."""
    written(write, str(folder / REPORT), lambda: training_of(config, trainer, metrics, shown))


def training_of(
    config: WorkerConfig, trainer: StreamTrainer, metrics: Mapping[str, Any], shown: Sequence[Shown]
) -> Training:
    """All that the report says."""
    trainer.steps.resolve()
    spans = trainer.steps.spans
    history = [(int(e["step"]), _plain(e)) for e in trainer.state.log_history]
    evaluations = [(step, found) for step, found in history if found]
    return Training(
        run=_run(config, trainer),
        spans=spans,
        evaluations=evaluations,
        changes=_changes(trainer, evaluations, _plain(metrics)),
        scores=trainer.scores,
        shown=shown,
        rows=config.learning.rows,
        workers=trainer.stream.world,
        start=spans[0].first - 1 if spans else 0,
        metrics=metrics,
    )


def _run(config: WorkerConfig, trainer: StreamTrainer) -> Run:
    card, order = config.card, config.order
    about = {
        "rows an epoch": f"{order.total:,}",
        f"{config.learning.rows} a step": f"{order.global_batch:,}",
        "steps an epoch": f"{order.steps:,}",
        "device": str(trainer.args.device),
    }
    if config.validation:
        corpus = config.validation.corpus
        about["held-out queries"] = f"{config.validation.queries.total_rows:,}"
        about["searched in"] = "their own passages" if corpus is None else f"{corpus.total_rows:,} passages"
    return Run(
        config.learning.command,
        card["flags"],
        card["base_model"] or "from scratch",
        card["data"],
        about,
        card["versions"],
    )


def _plain(entry: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of retrieval in what the Trainer logs."""
    return {n.removeprefix("eval_"): v for n, v in entry.items() if n.startswith("eval_") and "@" in n}


def _changes(
    trainer: StreamTrainer, evaluations: Sequence[tuple[int, Mapping[str, float]]], after: Mapping[str, float]
) -> list[Change]:
    """Query by query where both evaluations were made by this run, else what is known of the means."""
    last = trainer.validation.last if trainer.validation else None
    if trainer.first and last:
        return [change(name, trainer.first.values[name], last.values[name]) for name in last.values]
    before = next((found for step, found in evaluations if not step), {})
    return [Change(name, before.get(name), value) for name, value in after.items()]
