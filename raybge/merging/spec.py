"""Specs of a merge, resolved once from the options of `raybge.merge` and checked before any file is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybge.cli.checks import check_at_least
from raybge.cli.options import MergeOptions
from raybge.cli.parser import changed_values, declared_flags
from raybge.cluster.spec import ScaleSpec
from raybge.evaluation.metrics import METRICS
from raybge.util.errors import UserError

METRIC = METRICS[0]  # that a search maximizes
SUM_TOLERANCE = 1e-3  # of the weights' sum around 1

_WEIGHT_SOURCES = ("weights", "example_data", "search")
# Flags that have an effect only together with one of the flags listed.
_REQUIRED_FLAGS = {
    "ties_density": ("base_model",),
    **dict.fromkeys(("temperature", "batch_size", "max_input_length", "neg_number", "seed"), ("example_data",)),
    **dict.fromkeys(("search_corpus", "general", "max_evaluations", "storage_path"), ("search",)),
    **dict.fromkeys(("general_corpus", "general_floor"), ("general",)),
    **dict.fromkeys(
        ("num_workers", "use_gpu", "cpus_per_worker", "address", "on_bad_rows", "accept_any_text"),
        ("example_data", "search"),
    ),
}


@dataclass(frozen=True)
class ExampleSpec:
    """Examples that models are scored on, and how their losses become weights.

    Args:
        data: paths of the examples; empty if they are Python objects.
        temperature: weights are softmax(-loss / temperature).
        batch_size: examples per batch; a query is contrasted with the passages of its whole batch.
        max_input_length: longest text in tokens, special tokens included.
        neg_number: most negatives of an example.
        seed: of the choice among more negatives.
    """

    data: tuple[str, ...]
    temperature: float
    batch_size: int
    max_input_length: int
    neg_number: int
    seed: int


@dataclass(frozen=True)
class EvaluationFiles:
    """Evaluation data of a search: queries with their relevant passages, and the corpus they are searched in.

    Args:
        flag: name of the flag that gives the queries, "search" or "general".
        queries: paths of rows {"query", "pos"}.
        corpus: paths of rows {"text"}; empty: every `pos` and `neg` of the queries.
    """

    flag: str
    queries: tuple[str, ...]
    corpus: tuple[str, ...]


@dataclass(frozen=True)
class WeightSearchSpec:
    """Search for the weights that maximize a metric on one set, optionally without losing much on another.

    Args:
        target: set that is optimized.
        general: set on which the merged model must reach a floor; None: no such condition.
        general_floor: the floor, as a share of the best source model's metric.
        max_evaluations: most merge candidates that are evaluated.
    """

    target: EvaluationFiles
    general: EvaluationFiles | None
    general_floor: float
    max_evaluations: int


@dataclass(frozen=True)
class MergingSpec:
    """Checked configuration of a merge: what is merged, how, and where the weights come from.

    Exactly one of `weights`, `examples` and `search` is set.

    Args:
        names: source models, as the user spelled them: folders or hub names.
        paths: the same with absolute folders, which no other current folder turns into hub names.
        model_type: "encoder", "decoder", "reranker" or "encoder-decoder".
        method: "linear", "slerp" or "ties".
        ties_density: share of each tensor's changes, the largest, that ties keeps.
        base_model: model that the others were fine-tuned from, for ties.
        weights: one for each source model.
        output_path: folder of the merged model; None: the weights are only printed.
        on_bad_rows: "stop" or "skip".
        any_text: --accept_any_text, see `SourceFile`.
        flags: options that differ from their defaults, for the card and the report.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    model_type: str
    method: str
    ties_density: float
    base_model: str | None
    cache_dir: str | None
    trust_remote_code: bool
    weights: tuple[float, ...] | None
    examples: ExampleSpec | None
    search: WeightSearchSpec | None
    output_path: str | None
    on_bad_rows: str
    any_text: bool
    scale: ScaleSpec
    dry_run: bool
    flags: Mapping[str, Any]

    @classmethod
    def from_options(cls, options: MergeOptions, examples_in_memory: bool = False) -> MergingSpec:
        """Check the options and resolve them.

        Args:
            options: options of the command.
            examples_in_memory: the examples are Python objects instead of the files of `example_data`.

        Returns:
            The spec.

        Raises:
            UserError: an option is invalid, or has no effect with the others.
        """
        _check(options, examples_in_memory)
        names = tuple(options.model_names_or_paths)
        return cls(
            names=names,
            paths=tuple(os.path.abspath(name) if os.path.isdir(name) else name for name in names),
            model_type=options.model_type,
            method=options.merge_method,
            ties_density=options.ties_density,
            base_model=options.base_model,
            cache_dir=options.cache_dir,
            trust_remote_code=options.trust_remote_code,
            weights=None if options.weights is None else tuple(options.weights),
            examples=_example_spec(options) if examples_in_memory or options.example_data else None,
            search=_search_spec(options) if options.search else None,
            output_path=options.output_path,
            on_bad_rows=options.on_bad_rows,
            any_text=options.accept_any_text,
            scale=ScaleSpec.from_options(options),
            dry_run=options.dry_run,
            flags=changed_values(options),
        )


def _example_spec(options: MergeOptions) -> ExampleSpec:
    return ExampleSpec(
        tuple(options.example_data or ()),
        options.temperature,
        options.batch_size,
        options.max_input_length,
        options.neg_number,
        options.seed,
    )


def _search_spec(options: MergeOptions) -> WeightSearchSpec:
    target = EvaluationFiles("search", tuple(options.search or ()), tuple(options.search_corpus or ()))
    general = None
    if options.general:
        general = EvaluationFiles("general", tuple(options.general), tuple(options.general_corpus or ()))
    return WeightSearchSpec(target, general, options.general_floor, options.max_evaluations)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check(options: MergeOptions, examples_in_memory: bool) -> None:
    models = len(options.model_names_or_paths)
    if models < 2:
        raise UserError(f"--model_names_or_paths: at least 2 models are required, found {models}")
    present = {name for name in (*_WEIGHT_SOURCES, "general", "base_model") if getattr(options, name) is not None}
    present |= {"example_data"} if examples_in_memory else set()
    sources = [name for name in _WEIGHT_SOURCES if name in present]
    if len(sources) != 1:
        listing = " and ".join(f"--{name}" for name in sources) or "none of them"
        raise UserError(f"exactly one of --weights, --example_data and --search is required, found {listing}")
    _check_required_flags(options, present)
    _check_numbers(options)
    _check_method(options)
    if options.weights is not None:
        _check_weights(options, options.weights)
    if sources == ["example_data"] and options.model_type == "reranker":
        raise UserError("--example_data: --model_type reranker has no loss on examples; use --weights")
    if options.search and options.model_type != "encoder":
        raise UserError(
            f"--search evaluates embedding models: it requires --model_type encoder, found {options.model_type}"
        )
    _check_output(options)


def _check_required_flags(options: MergeOptions, present: set[str]) -> None:
    """Raise UserError for a flag that has no effect without another one."""
    flags = declared_flags(MergeOptions)
    changed = {name for name in _REQUIRED_FLAGS if getattr(options, name) != flags[name].default}
    for name in sorted(changed):
        if present.isdisjoint(_REQUIRED_FLAGS[name]):
            raise UserError(f"--{name} requires --{' or --'.join(_REQUIRED_FLAGS[name])}")
    for name in ("neg_number", "seed"):
        if name in changed and options.model_type != "encoder":
            raise UserError(
                f"--{name} requires --model_type encoder: examples of a {options.model_type} have no negatives"
            )


def _check_numbers(options: MergeOptions) -> None:
    check_at_least(1, options, "batch_size", "max_input_length", "max_evaluations")
    check_at_least(0, options, "neg_number", "seed")
    if not options.temperature > 0:
        raise UserError(f"--temperature must be above 0, found {options.temperature:g}")
    if not 0 <= options.general_floor <= 1:
        raise UserError(f"--general_floor must be from 0 to 1, found {options.general_floor:g}")
    if not 0 < options.ties_density <= 1:
        raise UserError(f"--ties_density must be above 0 and at most 1, found {options.ties_density:g}")


def _check_method(options: MergeOptions) -> None:
    method, models = options.merge_method, len(options.model_names_or_paths)
    if method == "slerp" and models != 2:
        raise UserError(f"--merge_method slerp merges exactly 2 models, found {models}")
    if (method == "ties") != (options.base_model is not None):
        raise UserError(
            "--merge_method ties and --base_model require each other: ties merges changes relative to the base model"
        )


def _check_weights(options: MergeOptions, weights: list[float]) -> None:
    models = len(options.model_names_or_paths)
    if len(weights) != models:
        raise UserError(f"--weights: {models} models require {models} weights, found {len(weights)}")
    if not abs(sum(weights) - 1) <= SUM_TOLERANCE:  # also true for NaN
        raise UserError(f"--weights must sum to 1, found {sum(weights):g}")
    if options.merge_method == "ties" and min(weights) < 0:
        raise UserError(f"--weights must be at least 0 with --merge_method ties, found {min(weights):g}")
    if options.output_path is None:
        raise UserError("--weights requires --output_path")


def _check_output(options: MergeOptions) -> None:
    """Raise UserError if the output folder may not be written; only a folder with a model is ever replaced."""
    for name in ("output_path", "storage_path"):
        if "://" in (place := getattr(options, name) or ""):
            raise UserError(f"--{name} {place}: URIs are not supported here; use a local or shared folder")
    path = options.output_path
    if path is None:
        return
    output = Path(os.path.realpath(path))
    for model in [*options.model_names_or_paths, *([options.base_model] if options.base_model else [])]:
        place = Path(os.path.realpath(model))
        if os.path.isdir(model) and (place == output or output in place.parents):
            raise UserError(f"--output_path {path} would replace the source model {model}; choose another folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_path {path} is a file; choose a folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not options.overwrite:
        raise UserError(f"--output_path {path} is not empty; choose another folder, or add --overwrite")
    if not (output / "config.json").is_file():
        raise UserError(
            f"--output_path {path} is not empty and contains no model (no config.json), so it is not overwritten; "
            "choose another folder"
        )
