"""What the flags of `raybge.merge` say together: checked before any file is read."""

from __future__ import annotations

import os
from pathlib import Path

from raybge.cli.options import MergeOptions
from raybge.cli.parser import declared
from raybge.util.errors import UserError

METRIC = "nDCG@10"  # what a search measures
SUM_MAY_DIFFER = 1e-3  # of weights from 1, either way


_WAYS = ("weights", "example_data", "search")
# What says something only beside another flag.
_NEEDED = {
    "ties_density": ("base_model",),
    **dict.fromkeys(("temperature", "batch_size", "max_input_length", "neg_number", "seed"), ("example_data",)),
    **dict.fromkeys(("search_corpus", "general", "max_evaluations", "storage_path"), ("search",)),
    **dict.fromkeys(("general_corpus", "general_floor"), ("general",)),
    **dict.fromkeys(
        ("num_workers", "use_gpu", "cpus_per_worker", "address", "on_bad_rows"), ("example_data", "search")
    ),
}


def check(arguments: MergeOptions, given_examples: bool = False) -> None:
    """UserError for flags that cannot be, or that would change nothing.

    `given_examples`: they come from Python, and not from --example_data.
    """
    models = len(arguments.model_names_or_paths)
    if models < 2:
        raise UserError(f"--model_names_or_paths takes two models or more, found {models}")
    there = {name for name in (*_WAYS, "general", "base_model") if getattr(arguments, name) is not None}
    there |= {"example_data"} if given_examples else set()
    ways = [name for name in _WAYS if name in there]
    if len(ways) != 1:
        found = " and ".join(f"--{name}" for name in ways) or "none of them"
        raise UserError(f"weights come from --weights, --example_data or --search, from one; found {found}")
    changed = {name for name in _NEEDED if getattr(arguments, name) != declared(MergeOptions)[name].default}
    for name in sorted(changed):
        if there.isdisjoint(_NEEDED[name]):
            raise UserError(f"--{name} says something of what is not given: it needs --{' or --'.join(_NEEDED[name])}")
    for name in ("neg_number", "seed"):
        if name in changed and arguments.model_type != "encoder":
            raise UserError(f"--{name}: examples of --model_type {arguments.model_type} have no negatives")
    _check_numbers(arguments)
    _check_method(arguments)
    if arguments.weights is not None:
        _check_weights(arguments, arguments.weights)
    if ways == ["example_data"] and arguments.model_type == "reranker":
        raise UserError("--model_type reranker: there is no loss on examples for it, give --weights")
    if arguments.search and arguments.model_type != "encoder":
        raise UserError(f"--model_type {arguments.model_type}: --search measures embedding models (encoder)")
    _check_output(arguments)


def _check_numbers(arguments: MergeOptions) -> None:
    for name in ("batch_size", "max_input_length", "max_evaluations"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, found {getattr(arguments, name)}")
    for name in ("neg_number", "seed"):
        if getattr(arguments, name) < 0:
            raise UserError(f"--{name} must be at least 0, found {getattr(arguments, name)}")
    if not arguments.temperature > 0:
        raise UserError(f"--temperature must be above 0, found {arguments.temperature:g}")
    if not 0 <= arguments.general_floor <= 1:
        raise UserError(f"--general_floor must be from 0 to 1, found {arguments.general_floor:g}")
    if not 0 < arguments.ties_density <= 1:
        raise UserError(f"--ties_density must be above 0 and at most 1, found {arguments.ties_density:g}")


def _check_method(arguments: MergeOptions) -> None:
    method, models = arguments.merge_method, len(arguments.model_names_or_paths)
    if method == "slerp" and models != 2:
        raise UserError(f"--merge_method slerp mixes two models, found {models}")
    if (method == "ties") != (arguments.base_model is not None):
        raise UserError("--merge_method ties and --base_model need each other: ties mixes changes of the base model")


def _check_weights(arguments: MergeOptions, weights: list[float]) -> None:
    models = len(arguments.model_names_or_paths)
    if len(weights) != models:
        raise UserError(f"--weights: {models} models need {models} weights, found {len(weights)}")
    if not abs(sum(weights) - 1) <= SUM_MAY_DIFFER:  # nan too
        raise UserError(f"--weights must have the sum 1, found {sum(weights):g}")
    if arguments.merge_method == "ties" and min(weights) < 0:
        raise UserError(f"--weights: with --merge_method ties none may be below 0, found {min(weights):g}")
    if arguments.output_path is None:
        raise UserError("missing: --output_path")


def _check_output(arguments: MergeOptions) -> None:
    """Whether the output folder may be written; a folder that holds no model is never replaced."""
    for name in ("output_path", "storage_path"):
        if "://" in (place := getattr(arguments, name) or ""):
            raise UserError(f"--{name} {place}: merging into a URI is not built yet; give a folder")
    path = arguments.output_path
    if path is None:
        return
    output = Path(os.path.realpath(path))
    named = [*arguments.model_names_or_paths, *([arguments.base_model] if arguments.base_model else [])]
    for model in named:
        place = Path(os.path.realpath(model))
        if os.path.isdir(model) and (place == output or output in place.parents):
            raise UserError(f"--output_path {path} would replace {model}, which is mixed; choose another folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_path {path} is a file")
    if not output.exists() or not any(output.iterdir()):
        return
    if not arguments.overwrite:
        raise UserError(f"--output_path {path} is not empty; choose another, or add --overwrite")
    if not (output / "config.json").is_file():
        raise UserError(f"--output_path {path} is not empty, and what is there is no model: it is not overwritten")
