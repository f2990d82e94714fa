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
from collections.abc import Mapping, Sequence
from typing import Any

from raybge.cli import run as cli
from raybge.cli.options import MergeOptions
from raybge.merging.run import _mixed, merge


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


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(MergeOptions, merge, "merge", argv)


if __name__ == "__main__":
    raise SystemExit(main())
