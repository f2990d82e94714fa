"""Result of a training run, as the Python functions return it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from raybge.evaluation.metric_changes import METRIC_CHANGES, MetricChange, changes_in
from raybge.evaluation.weight_versions import WEIGHT_VERSIONS, WeightVersion, versions_in
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
        versions: with `eval_data` and `ema` or `average_checkpoints`, the evaluation of the last and of the averaged
            weights.
    """

    model: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    changes: Sequence[MetricChange] = ()
    report: str | None = None
    versions: Sequence[WeightVersion] = ()

    @classmethod
    def of(cls, spec: TrainingSpec, metrics: Mapping[str, float]) -> Self:
        """Return the result of a run; empty metrics are those of a dry run."""
        if not metrics:
            return cls()
        folder = spec.run.output_dir
        return cls(
            os.path.join(folder, spec.task.model_folder).rstrip("/"),
            {name: value for name, value in metrics.items() if name not in (METRIC_CHANGES, WEIGHT_VERSIONS)},
            tuple(changes_in(metrics)),
            os.path.join(folder, REPORT),
            tuple(versions_in(metrics)),
        )
