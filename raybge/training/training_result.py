"""Result of a training run, as the Python functions return it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from raybge.evaluation.metric_changes import METRIC_CHANGES, MetricChange, changes_in
from raybge.report.page import REPORT
from raybge.training.spec import TrainingSpec


@dataclass(frozen=True)
class TrainingResult:
    """Result of `raybge.finetune` and `raybge.pretrain_retromae`.

    Args:
        model: folder of the trained model; None with `dry_run`.
        metrics: the Trainer's metrics by name, such as "train_loss", "steps" and, with `eval_data`, "eval_nDCG@10";
            empty with `dry_run`.
        changes: with `eval_data`, each retrieval metric before and after training, and the 95% interval of the
            difference.
        report: the run's page; None with `dry_run`.
    """

    model: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    changes: Sequence[MetricChange] = ()
    report: str | None = None

    @classmethod
    def of(cls, spec: TrainingSpec, metrics: Mapping[str, float]) -> Self:
        """Return the result of a run; empty metrics are those of a dry run."""
        if not metrics:
            return cls()
        folder = spec.run.output_dir
        return cls(
            os.path.join(folder, spec.task.model_folder).rstrip("/"),
            {name: value for name, value in metrics.items() if name != METRIC_CHANGES},
            tuple(changes_in(metrics)),
            os.path.join(folder, REPORT),
        )
