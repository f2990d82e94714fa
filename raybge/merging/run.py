"""A merge, from the command's options to the written model: check, read, align, determine the weights, write."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raybge.cli.console import Console
from raybge.cli.options import MergeOptions
from raybge.merging.spec import METRIC, MergingSpec
from raybge.util.plural import plural

if TYPE_CHECKING:
    from raybge.merging.alignment import AlignedModels
    from raybge.merging.example_weights import MergeWeights
    from raybge.merging.weight_search import MergeCandidate


@dataclass(frozen=True)
class MergeResult:
    """Result of `raybge.mix_models(..., return_model=False)` and its variants; all fields are empty on a dry run.

    Args:
        weights: weight of each model.
        losses: loss of each model on the examples.
        target: nDCG@10 of the best candidate of a search; None without a search.
        general: nDCG@10 on the second set of queries; None without one.
        candidates: all weights that a search evaluated, with their metrics.
        model: folder of the merged model; None if none was written.
        report: page of the merge, in that folder.
    """

    weights: Sequence[float] = ()
    losses: Sequence[float] = ()
    target: float | None = None
    general: float | None = None
    candidates: Sequence[MergeCandidate] = ()
    model: str | None = None
    report: str | None = None


def merge(options: MergeOptions, console: Console, examples: Sequence[Any] | None = None) -> MergeResult:
    """Run the command `raybge.merge`.

    Args:
        options: options of the command.
        console: receives the plan, the progress and the results.
        examples: rows as Python objects, in place of `example_data`.

    Returns:
        Weights and what they follow from, and the merged model's folder; empty on a dry run.

    Raises:
        UserError: an option, a file, a row or a model is invalid.
    """
    return _run(MergingSpec.from_options(options, examples is not None), console, examples)


def merge_and_load(options: MergeOptions, console: Console, examples: Sequence[Any] | None = None) -> Any:
    """Run the command and load the merged model from its folder.

    Args:
        options: options of the command, with an `output_path`.
        console: see `merge`.
        examples: see `merge`.

    Returns:
        The transformers model; on a dry run an empty `MergeResult`.
    """
    from raybge.merging.sources import SourceModel

    spec = MergingSpec.from_options(options, examples is not None)
    result = _run(spec, console, examples)
    if spec.dry_run:
        return result
    model = SourceModel.open(str(spec.output_path), spec.model_type, "--output_path")
    return model.load(spec.model_type, spec.trust_remote_code)


def _run(spec: MergingSpec, console: Console, examples: Sequence[Any] | None) -> MergeResult:
    from raybge.merging.alignment import AlignedModels
    from raybge.merging.example_weights import read_examples
    from raybge.merging.writing import search_results, write_output
    from raybge.report.page import REPORT

    start = time.monotonic()
    rows = read_examples(spec, examples, console)
    aligned = AlignedModels(spec.paths, spec.model_type, spec.base_model, spec.cache_dir, spec.trust_remote_code)
    _print_plan(spec, aligned, console)
    merge_weights = _merge_weights(spec, aligned, rows, console)
    if spec.dry_run:
        return MergeResult()
    _print_weights(spec, merge_weights, console)
    results = search_results(spec, merge_weights)
    target, general = results.get("target"), results.get("general")
    if results:
        metrics = [f"{name} {results[name]:.4f}" for name in ("target", "general") if name in results]
        console.info(f"{METRIC}: {', '.join(metrics)}; {plural(results['evaluations'], 'candidate')} evaluated")
    report = None
    if spec.output_path is not None:
        write_output(spec, aligned, merge_weights, lambda: time.monotonic() - start, console)
        console.info(f"written: {spec.output_path}\nreport: {os.path.join(spec.output_path, REPORT)}")
        report = os.path.join(spec.output_path, REPORT)
    weights, losses, candidates = merge_weights.weights, merge_weights.losses, merge_weights.candidates
    return MergeResult(weights, losses, target, general, candidates, spec.output_path, report)


def _merge_weights(spec: MergingSpec, aligned: AlignedModels, rows: list[Any], console: Console) -> MergeWeights:
    from raybge.merging.candidate_evaluation import run_weight_search
    from raybge.merging.example_weights import MergeWeights, score_models

    if spec.weights is not None:
        return MergeWeights(list(spec.weights))
    if spec.search:
        return run_weight_search(spec, aligned, console)
    return score_models(spec, rows, console)


def _print_plan(spec: MergingSpec, aligned: AlignedModels, console: Console) -> None:
    from raybge.merging.sources import conflicting_prompts

    settings, kind = aligned.settings, aligned.models[0].config.get("model_type", "custom code")
    pooling = f", {settings.pooling} pooling, {'' if settings.normalize else 'not '}normalized" if settings else ""
    console.info(
        f"models: {len(spec.names)}, {kind}, {plural(len(aligned.tensors), 'tensor')}, "
        f"{aligned.bytes / 1e6:,.0f} MB each{pooling}; merge method: {spec.method}"
    )
    for name in conflicting_prompts(aligned.models):
        console.info(f"the prompts named {name} differ: the merged model has the first model's")


def _print_weights(spec: MergingSpec, merge_weights: MergeWeights, console: Console) -> None:
    """Print a table of the models, their losses if there are any, and their weights."""
    columns = [list(spec.names), [f"{weight:.4f}" for weight in merge_weights.weights]]
    if merge_weights.losses:
        columns.insert(1, [f"{loss:.4f}" for loss in merge_weights.losses])
    heads = ["model", "loss", "weight"] if merge_weights.losses else ["model", "weight"]
    console.table(heads, [list(row) for row in zip(*columns, strict=True)])
