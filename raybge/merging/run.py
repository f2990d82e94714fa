"""Mix models of one architecture into one, as LM-Cocktail does: fine-tuning costs general ability, and mixing with the
base model gives it back (https://arxiv.org/abs/2311.13534).

    python -m raybge.merge --model_names_or_paths runs/mine BAAI/bge-small-en-v1.5 --model_type encoder \\
        --weights 0.5 0.5 --output_path runs/mixed
    python -m raybge.merge --model_names_or_paths runs/mine BAAI/bge-small-en-v1.5 --model_type encoder \\
        --search dev.jsonl --general other.jsonl --output_path runs/mixed
    python -m raybge.merge --help

From Python: `raybge.mix_models`, `mix_models_with_data` and `mix_models_by_layers`, called as the recipe's.

Weights that are given need no Ray: a mixture is written tensor by tensor. Examples and searches are measured on Ray.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.cli import run as cli
from raybge.cli.console import Console
from raybge.cli.options import MergeOptions
from raybge.merging.coefficient_search import best, lowest
from raybge.merging.spec import METRIC, check
from raybge.util.versions import versions

if TYPE_CHECKING:
    from raybge.merging.coefficients import Found
    from raybge.merging.methods import Cocktail

REPORT = "report.html"


# --- from Python ------------------------------------------------------------------------------------------------------


def _mixed(flags: dict[str, Any], return_model: bool, examples: list[Any] | None = None) -> Any:
    with ExitStack() as stack:
        if return_model and flags["output_path"] is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="raybge-merge-"))
            flags["output_path"] = f"{folder}/model"

        def run(arguments: MergeOptions, console: Console) -> Any:
            from raybge.merging.sources import Ingredient

            summary = merge(arguments, console, examples)
            if not return_model or arguments.dry_run:
                return summary
            mixture = Ingredient.find(str(arguments.output_path), arguments.model_type, "--output_path")
            return mixture.load(arguments.model_type, arguments.trust_remote_code)

        return cli.call(MergeOptions, run, "merge", flags)


# --- the command ------------------------------------------------------------------------------------------------------


def merge(arguments: MergeOptions, console: Console, examples: list[Any] | None = None) -> dict[str, Any]:
    """The command: check, open, find the weights, mix, report. `examples` are rows in place of --example_data."""
    from raybge.merging.coefficients import Found, example_rows, scored, searched
    from raybge.merging.methods import Cocktail

    start = time.monotonic()
    check(arguments, examples is not None)
    rows = example_rows(arguments, examples, console)
    names = _absolute(arguments)
    options = arguments.base_model, arguments.cache_dir, arguments.trust_remote_code
    cocktail = Cocktail(names, arguments.model_type, *options)
    _describe(arguments, cocktail, console)
    if arguments.weights is not None:
        found = Found(arguments.weights)
    elif arguments.search:
        found = searched(arguments, cocktail, console)
    else:
        found = scored(arguments, names, rows, console)
    if arguments.dry_run:
        return {}
    heads, shown = _table(arguments, found)
    console.table(heads, shown)
    summary: dict[str, Any] = {"weights": found.weights}
    if found.losses:
        summary["losses"] = list(found.losses)
    if found.tasted:
        summary |= _measured(arguments, found)
        said = [f"{name} {summary[name]:.4f}" for name in ("target", "general") if name in summary]
        console.info(f"{METRIC}: {', '.join(said)}; {summary['evaluations']} mixtures measured")
    if arguments.output_path is not None:
        _write(arguments, cocktail, found, start, console)
        console.info(f"written: {arguments.output_path}, with its {REPORT}")
        summary["output_path"] = arguments.output_path
    return summary


def _absolute(arguments: MergeOptions) -> list[str]:
    """The models: folders from any current folder, and never taken for names on the hub."""
    return [os.path.abspath(name) if os.path.isdir(name) else name for name in arguments.model_names_or_paths]


def _describe(arguments: MergeOptions, cocktail: Cocktail, console: Console) -> None:
    from raybge.merging.sources import differing_prompts

    settings, kind = cocktail.settings, cocktail.models[0].config.get("model_type", "of their own code")
    how = f", {settings.pooling} pooling, {'' if settings.normalize else 'not '}normalised" if settings else ""
    console.info(
        f"models: {len(arguments.model_names_or_paths)}, {kind}, {len(cocktail.aligned):,} tensors, "
        f"{cocktail.bytes / 1e6:,.0f} MB each{how}; mixed by {arguments.merge_method}"
    )
    for name in differing_prompts(cocktail.models):
        console.info(f"prompts named {name} differ: the mixture has that of the first model")


def _table(arguments: MergeOptions, found: Found) -> tuple[list[str], list[list[str]]]:
    """Models, their losses where there are any, and their weights."""
    columns = [arguments.model_names_or_paths, [f"{weight:.4f}" for weight in found.weights]]
    if found.losses:
        columns.insert(1, [f"{loss:.4f}" for loss in found.losses])
    heads = ["model", "loss", "weight"] if found.losses else ["model", "weight"]
    return heads, [list(row) for row in zip(*columns, strict=True)]


def _measured(arguments: MergeOptions, found: Found) -> dict[str, Any]:
    """What the chosen mixture came to, and all that were measured."""
    chosen = best(found.tasted, arguments.general_floor)
    general = {} if chosen.general is None else {"general": chosen.general}
    mixtures = [asdict(each) for each in found.tasted]
    return {"target": chosen.target, **general, "evaluations": len(found.tasted), "mixtures": mixtures}


# --- what is written --------------------------------------------------------------------------------------------------


def _write(arguments: MergeOptions, cocktail: Cocktail, found: Found, start: float, console: Console) -> None:
    """The output folder, which gets its name when it is whole."""
    from raybge.merging import page as report
    from raybge.merging.coefficients import mix_into
    from raybge.report.page import written
    from raybge.util.atomic_write import folder_written_aside

    assert arguments.output_path is not None
    path = os.path.abspath(arguments.output_path)
    with folder_written_aside(path, "--output_path") as aside:
        with console.bar("mix", len(cocktail.aligned), "tensors") as bar:
            mix_into(arguments, cocktail, Path(aside), found.weights, lambda: bar.update(1))
        _write_card(arguments, found, Path(aside))
        about = partial(_page, arguments, found, time.monotonic() - start)
        written(report.write, str(Path(aside) / REPORT), about)


def _write_card(arguments: MergeOptions, found: Found, folder: Path) -> None:
    from raybge.cli.parser import given
    from raybge.merging.mixture_card import MergeCard

    MergeCard(
        model_type=arguments.model_type,
        models=list(zip(_absolute(arguments), found.weights, strict=True)),
        method=arguments.merge_method,
        losses=found.losses,
        metric=METRIC,
        measured=_measured(arguments, found) if found.tasted else {},
        flags={**given(arguments), "model_names_or_paths": _absolute(arguments)},
        versions=versions("torch", "transformers", "safetensors"),
    ).write(folder)


def _page(arguments: MergeOptions, found: Found, seconds: float) -> Any:
    from raybge.cli.parser import given
    from raybge.merging.page import Merging
    from raybge.report.run_details import Run

    return Merging(
        run=Run("merge", given(arguments), versions=versions("torch", "transformers", "safetensors")),
        models=arguments.model_names_or_paths,
        weights=found.weights,
        method=arguments.merge_method,
        losses=found.losses,
        tasted=found.tasted,
        least=lowest(found.tasted, arguments.general_floor) if arguments.general else None,
        metric=METRIC,
        seconds=seconds,
    )
