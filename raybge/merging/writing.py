"""Writing of a merged model's folder: weights and configuration, model card and report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.cli.console import Console
from raybge.merging.spec import METRIC, MergingSpec
from raybge.merging.weight_search import best_candidate, general_threshold
from raybge.model.origin import ModelOrigin
from raybge.report.page import REPORT
from raybge.util.errors import UserError
from raybge.util.versions import versions

if TYPE_CHECKING:
    from raybge.merging.alignment import AlignedModels
    from raybge.merging.example_weights import MergeWeights
    from raybge.merging.page import MergingReport


def write_merged(
    spec: MergingSpec,
    aligned: AlignedModels,
    folder: Path,
    weights: Sequence[float],
    on_tensor: Callable[[], Any] = lambda: None,
) -> None:
    """Write a merged model's folder except for its card and report.

    Args:
        spec: the merge.
        aligned: the source models.
        folder: an existing folder.
        weights: one for each source model.
        on_tensor: called after each tensor.

    Raises:
        UserError: the folder cannot be written, for example because the disk is full.
    """
    try:
        aligned.write(folder, weights, spec.method, spec.ties_density, on_tensor)
    except OSError as error:
        raise UserError(f"the merged model cannot be written to {folder.parent} ({error.strerror or error})") from error


def write_output(
    spec: MergingSpec,
    aligned: AlignedModels,
    merge_weights: MergeWeights,
    seconds: Callable[[], float],
    console: Console,
) -> None:
    """Write the output folder with card and report; it appears under its name only when complete.

    Args:
        spec: the merge; its `output_path` is set.
        aligned: the source models.
        merge_weights: weights and their origin.
        seconds: duration of the merge so far.
        console: receives the progress.
    """
    from raybge.merging import page
    from raybge.report.page import write_or_log
    from raybge.util.atomic_write import atomic_folder

    assert spec.output_path is not None
    with atomic_folder(os.path.abspath(spec.output_path), "--output_path") as partial_folder:
        folder = Path(partial_folder)
        with console.bar("merge", len(aligned.tensors), "tensor") as bar:
            write_merged(spec, aligned, folder, merge_weights.weights, lambda: bar.update(1))
        _write_card(spec, merge_weights, folder)
        write_or_log(page.write, str(folder / REPORT), partial(_report, spec, merge_weights, seconds()))


def search_results(spec: MergingSpec, merge_weights: MergeWeights) -> dict[str, Any]:
    """Return the metrics of a search's best candidate, and all candidates; empty if there was no search."""
    if not spec.search or not merge_weights.candidates:
        return {}
    best = best_candidate(merge_weights.candidates, spec.search.general_floor)
    general = {} if best.general is None else {"general": best.general}
    candidates = [asdict(each) for each in merge_weights.candidates]
    return {"target": best.target, **general, "evaluations": len(candidates), "mixtures": candidates}


def _write_card(spec: MergingSpec, merge_weights: MergeWeights, folder: Path) -> None:
    from raybge.merging.merged_card import MergedModelCard

    MergedModelCard(
        model_type=spec.model_type,
        models=list(zip(spec.paths, merge_weights.weights, strict=True)),
        method=spec.method,
        losses=merge_weights.losses,
        metric=METRIC,
        search_results=search_results(spec, merge_weights),
        flags={**spec.flags, "model_names_or_paths": list(spec.paths)},
        versions=_versions(),
        origins=[ModelOrigin.of(path, spec.cache_dir) for path in spec.paths],
    ).write(folder)


def _report(spec: MergingSpec, merge_weights: MergeWeights, seconds: float) -> MergingReport:
    from raybge.merging.page import MergingReport
    from raybge.report.run_details import RunDetails

    threshold = None
    if spec.search and spec.search.general:
        threshold = general_threshold(merge_weights.candidates, spec.search.general_floor)
    return MergingReport(
        run=RunDetails("merge", spec.flags, versions=_versions()),
        models=spec.names,
        weights=merge_weights.weights,
        method=spec.method,
        losses=merge_weights.losses,
        candidates=merge_weights.candidates,
        general_threshold=threshold,
        metric=METRIC,
        seconds=seconds,
    )


def _versions() -> dict[str, str]:
    return versions("torch", "transformers", "safetensors")
