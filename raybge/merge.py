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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge import cli
from raybge.arguments import MergeArguments
from raybge.merge_flags import METRIC, check
from raybge.screen import Screen
from raybge.weight_search import best, lowest

if TYPE_CHECKING:
    from raybge.merge_weights import Found
    from raybge.model.cocktail import Cocktail

REPORT = "report.html"


# --- from Python ------------------------------------------------------------------------------------------------------


def mix_models(
    model_names_or_paths: Sequence[str],
    model_type: str,
    weights: Sequence[float] | None,
    output_path: str | None = None,
    *,
    return_model: bool = True,
    **flags: Any,
) -> Any:
    """The weighted sum of models; arguments and their order are the recipe's.

    Args:
        model_names_or_paths: two or more folders, or names on the hub.
        model_type: "encoder", "decoder", "reranker" or "encoder-decoder".
        weights: one for each model, their sum 1; None where `flags` say how they are found.
        output_path: folder for the mixture; None: it is not kept.
        return_model: load the mixture.
        flags: others of the command, such as `merge_method="slerp"` or `search="dev.jsonl"`.

    Returns:
        The transformers model, loaded from what was written, or without `return_model` the command's summary.

    Raises UserError, before any model loads, for flags, files or models that cannot be used.
    """
    models = list(model_names_or_paths)
    about: dict[str, Any] = dict(model_names_or_paths=models, model_type=model_type, output_path=output_path)
    if weights is not None:
        about["weights"] = list(map(float, weights))
    return _mixed({**about, **flags}, return_model)


mix_models_by_layers = mix_models  # the recipe's way to need less memory, which is the only one here


def mix_models_with_data(
    model_names_or_paths: Sequence[str],
    model_type: str,
    example_data: Sequence[Mapping[str, Any]] | str,
    temperature: float = 5.0,
    batch_size: int = 2,
    max_input_length: int = 2048,
    neg_number: int = 7,
    output_path: str | None = None,
    *,
    return_model: bool = True,
    **flags: Any,
) -> Any:
    """The weighted sum of models, each weighing the more the lower its loss on a few examples is.

    Args:
        model_type: "encoder", "decoder" or "encoder-decoder".
        example_data: rows {"query", "pos", "neg"}, or for language models {"input", "output"}; or the path of a file.
        temperature: weights are softmax(-loss / temperature).
        batch_size: examples at a time; a query is told apart from the passages of all of them.
        max_input_length: in tokens.
        neg_number: negatives of an example at most.

    The others, what is returned and what is raised are those of `mix_models`.
    """
    models = list(model_names_or_paths)
    about: dict[str, Any] = dict(model_names_or_paths=models, model_type=model_type, output_path=output_path)
    about |= dict(temperature=temperature, batch_size=batch_size, max_input_length=max_input_length)
    about |= dict(neg_number=neg_number, **flags)
    if isinstance(example_data, str | os.PathLike):
        return _mixed({**about, "example_data": example_data}, return_model)
    return _mixed(about, return_model, list(example_data))


def _mixed(flags: dict[str, Any], return_model: bool, examples: list[Any] | None = None) -> Any:
    with ExitStack() as stack:
        if return_model and flags["output_path"] is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="raybge-merge-"))
            flags["output_path"] = f"{folder}/model"

        def run(arguments: MergeArguments, screen: Screen) -> Any:
            from raybge.model.ingredients import Ingredient

            summary = merge(arguments, screen, examples)
            if not return_model or arguments.dry_run:
                return summary
            mixture = Ingredient.find(str(arguments.output_path), arguments.model_type, "--output_path")
            return mixture.load(arguments.model_type, arguments.trust_remote_code)

        return cli.call(MergeArguments, run, "merge", flags)


# --- the command ------------------------------------------------------------------------------------------------------


def merge(arguments: MergeArguments, screen: Screen, examples: list[Any] | None = None) -> dict[str, Any]:
    """The command: check, open, find the weights, mix, report. `examples` are rows in place of --example_data."""
    from raybge.merge_weights import Found, example_rows, scored, searched
    from raybge.model.cocktail import Cocktail

    start = time.monotonic()
    check(arguments, examples is not None)
    rows = example_rows(arguments, examples, screen)
    names = _absolute(arguments)
    options = arguments.base_model, arguments.cache_dir, arguments.trust_remote_code
    cocktail = Cocktail(names, arguments.model_type, *options)
    _describe(arguments, cocktail, screen)
    if arguments.weights is not None:
        found = Found(arguments.weights)
    elif arguments.search:
        found = searched(arguments, cocktail, screen)
    else:
        found = scored(arguments, names, rows, screen)
    if arguments.dry_run:
        return {}
    heads, shown = _table(arguments, found)
    screen.table(heads, shown)
    summary: dict[str, Any] = {"weights": found.weights}
    if found.losses:
        summary["losses"] = list(found.losses)
    if found.tasted:
        summary |= _measured(arguments, found)
        said = [f"{name} {summary[name]:.4f}" for name in ("target", "general") if name in summary]
        screen.say(f"{METRIC}: {', '.join(said)}; {summary['evaluations']} mixtures measured")
    if arguments.output_path is not None:
        _write(arguments, cocktail, found, start, screen)
        screen.say(f"written: {arguments.output_path}, with its {REPORT}")
        summary["output_path"] = arguments.output_path
    return summary


def _absolute(arguments: MergeArguments) -> list[str]:
    """The models: folders from any current folder, and never taken for names on the hub."""
    return [os.path.abspath(name) if os.path.isdir(name) else name for name in arguments.model_names_or_paths]


def _describe(arguments: MergeArguments, cocktail: Cocktail, screen: Screen) -> None:
    from raybge.model.ingredients import differing_prompts

    settings, kind = cocktail.settings, cocktail.models[0].config.get("model_type", "of their own code")
    how = f", {settings.pooling} pooling, {'' if settings.normalize else 'not '}normalised" if settings else ""
    screen.say(
        f"models: {len(arguments.model_names_or_paths)}, {kind}, {len(cocktail.aligned):,} tensors, "
        f"{cocktail.bytes / 1e6:,.0f} MB each{how}; mixed by {arguments.merge_method}"
    )
    for name in differing_prompts(cocktail.models):
        screen.say(f"prompts named {name} differ: the mixture has that of the first model")


def _table(arguments: MergeArguments, found: Found) -> tuple[list[str], list[list[str]]]:
    """Models, their losses where there are any, and their weights."""
    columns = [arguments.model_names_or_paths, [f"{weight:.4f}" for weight in found.weights]]
    if found.losses:
        columns.insert(1, [f"{loss:.4f}" for loss in found.losses])
    heads = ["model", "loss", "weight"] if found.losses else ["model", "weight"]
    return heads, [list(row) for row in zip(*columns, strict=True)]


def _measured(arguments: MergeArguments, found: Found) -> dict[str, Any]:
    """What the chosen mixture came to, and all that were measured."""
    chosen = best(found.tasted, arguments.general_floor)
    general = {} if chosen.general is None else {"general": chosen.general}
    mixtures = [asdict(each) for each in found.tasted]
    return {"target": chosen.target, **general, "evaluations": len(found.tasted), "mixtures": mixtures}


# --- what is written --------------------------------------------------------------------------------------------------


def _write(arguments: MergeArguments, cocktail: Cocktail, found: Found, start: float, screen: Screen) -> None:
    """The output folder, which gets its name when it is whole."""
    from raybge.merge_weights import mix_into
    from raybge.output import folder_written_aside
    from raybge.report import merge as report
    from raybge.report.page import written

    assert arguments.output_path is not None
    path = os.path.abspath(arguments.output_path)
    with folder_written_aside(path, "--output_path") as aside:
        with screen.bar("mix", len(cocktail.aligned), "tensors") as bar:
            mix_into(arguments, cocktail, Path(aside), found.weights, lambda: bar.update(1))
        _write_card(arguments, found, Path(aside))
        about = partial(_page, arguments, found, time.monotonic() - start)
        written(report.write, str(Path(aside) / REPORT), about)


def _write_card(arguments: MergeArguments, found: Found, folder: Path) -> None:
    from raybge.flags import given
    from raybge.model.merge_card import MergeCard

    MergeCard(
        model_type=arguments.model_type,
        models=list(zip(_absolute(arguments), found.weights, strict=True)),
        method=arguments.merge_method,
        losses=found.losses,
        metric=METRIC,
        measured=_measured(arguments, found) if found.tasted else {},
        flags={**given(arguments), "model_names_or_paths": _absolute(arguments)},
        versions=_versions(),
    ).write(folder)


def _page(arguments: MergeArguments, found: Found, seconds: float) -> Any:
    from raybge.flags import given
    from raybge.report.merge import Merging
    from raybge.report.run import Run

    return Merging(
        run=Run("merge", given(arguments), versions=_versions()),
        models=arguments.model_names_or_paths,
        weights=found.weights,
        method=arguments.merge_method,
        losses=found.losses,
        tasted=found.tasted,
        least=lowest(found.tasted, arguments.general_floor) if arguments.general else None,
        metric=METRIC,
        seconds=seconds,
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from raybge import __version__

    return {"raybge": __version__, **{name: version(name) for name in ("torch", "transformers", "safetensors")}}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(MergeArguments, merge, "merge", argv)


if __name__ == "__main__":
    raise SystemExit(main())
