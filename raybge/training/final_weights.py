"""Weights of the saved model: the last ones, or an average of them, and the evaluation of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raybge.evaluation.metric_changes import METRIC_CHANGES, MetricChange, to_json, training_changes
from raybge.evaluation.metrics import retrieval_metrics
from raybge.evaluation.query_examples import METRIC, RetrievalResult
from raybge.evaluation.weight_versions import LAST, WEIGHT_VERSIONS, WeightVersion, versions_to_json
from raybge.training.checkpoint.manifest import checkpoint_name, checkpoint_path, list_checkpoints
from raybge.training.weight_averages import held_weights, mean_of_checkpoints, set_weights

if TYPE_CHECKING:
    from torch import Tensor

    from raybge.training.trainer import StreamTrainer


@dataclass
class _Version:
    """A version of the weights with its evaluation; metrics are empty without one."""

    name: str
    weights: Mapping[str, Tensor]
    metrics: Mapping[str, float]
    result: RetrievalResult | None = None


def final_metrics(trainer: StreamTrainer) -> dict[str, Any]:
    """Give the model the weights to save, and evaluate them. Collective, at the end of training.

    Args:
        trainer: the trainer.

    Returns:
        Retrieval metrics of the weights to save as "eval_NAME", their changes by training and, with averages, the
        evaluation of each version; empty without an evaluation.
    """
    metrics = _evaluate_last(trainer)
    versions = _evaluate_averages(trainer, metrics)
    saved = _choose(trainer, versions) if versions else None
    if trainer.validation is None:
        return {}
    if saved is not None:
        metrics, trainer.validation.last_result = dict(saved.metrics), saved.result
    results: dict[str, Any] = {f"eval_{name}": value for name, value in metrics.items()}
    results[METRIC_CHANGES] = to_json(_metric_changes(trainer, results))
    if saved is not None:
        results[WEIGHT_VERSIONS] = versions_to_json(_compare(versions, saved))
    return results


def _evaluate_last(trainer: StreamTrainer) -> dict[str, float]:
    """Return the metrics of the weights in the model; evaluate them unless the last evaluation did."""
    if trainer.validation is None:
        return {}
    last = [entry for entry in trainer.state.log_history if retrieval_metrics(entry)][-1:]
    is_final = last and last[0]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end
    # A resumed process has not made the evaluation itself.
    if is_final and not (trainer.context.averaging.requested and trainer.validation.last_result is None):
        return retrieval_metrics(last[0])
    return retrieval_metrics(trainer.evaluate())


def _evaluate_averages(trainer: StreamTrainer, last: Mapping[str, float]) -> list[_Version]:
    """Make and evaluate the averages.

    Args:
        trainer: the trainer, whose model has the last weights.
        last: metrics of these.

    Returns:
        The versions, the last weights first; empty if no average was requested.
    """
    averaging, validation = trainer.context.averaging, trainer.validation
    if not averaging.requested:
        return []
    versions = [_Version(LAST, held_weights(trainer.model), last, validation.last_result if validation else None)]
    if trainer.ema is not None:
        versions.append(_Version(f"EMA {trainer.ema.decay:g}", trainer.ema.held(), {}))
    if averaging.steps:
        wanted = {checkpoint_name(checkpoint_path("", step)) for step in averaging.steps}
        paths = [path for path in reversed(list_checkpoints(trainer.storage)) if checkpoint_name(path) in wanted]
        if paths:  # none only if another program deleted them
            name = f"mean of {len(paths)} checkpoints"
            versions.append(_Version(name, mean_of_checkpoints(trainer, paths), {}))
    for version in versions[1:]:
        set_weights(trainer.model, version.weights)
        if validation is not None:
            version.metrics = trainer.measure(f" {version.name}")
            version.result = validation.last_result
    return versions


def _choose(trainer: StreamTrainer, versions: list[_Version]) -> _Version:
    """Give the model the weights to save: the average or, on request, the version with the best evaluation."""
    saved = versions[1]
    if trainer.context.averaging.keep_better:  # the last weights if all are equal
        saved = max(versions, key=lambda version: version.metrics[METRIC])
    set_weights(trainer.model, saved.weights)
    return saved


def _compare(versions: list[_Version], saved: _Version) -> list[WeightVersion]:
    """Compare each version with the first, the last weights."""
    last = versions[0]
    return [
        WeightVersion(
            version.name,
            version is saved,
            training_changes(last.result, version.result, last.metrics, version.metrics),
        )
        for version in versions
    ]


def _metric_changes(trainer: StreamTrainer, metrics: Mapping[str, Any]) -> list[MetricChange]:
    """Compare the evaluation before the first step with that of the weights to save, given as "eval_NAME"."""
    last = trainer.validation.last_result if trainer.validation else None
    history = trainer.state.log_history
    before = next((values for entry in history if not entry["step"] and (values := retrieval_metrics(entry))), {})
    return training_changes(trainer.first_result, last, before, retrieval_metrics(metrics))
