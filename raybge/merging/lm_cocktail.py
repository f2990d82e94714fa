"""Python functions with the names and signatures of LM-Cocktail's, https://github.com/FlagOpen/FlagEmbedding."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from raybge.cli.options import MergeOptions
from raybge.cli.run import call_command
from raybge.cli.signatures import with_keywords

if TYPE_CHECKING:
    from raybge.cli.options.merging_keywords import MixKeywords, MixWithDataKeywords
    from raybge.merging.run import MergeResult

ModelType = Literal["encoder", "decoder", "reranker", "encoder-decoder"]
Name = str | Path


@overload
def mix_models(
    model_names_or_paths: Sequence[Name],
    model_type: ModelType,
    weights: Sequence[float] | None,
    output_path: Name | None = None,
    *,
    return_model: Literal[False],
    **flags: Unpack[MixKeywords],
) -> MergeResult: ...
@overload
def mix_models(
    model_names_or_paths: Sequence[Name],
    model_type: ModelType,
    weights: Sequence[float] | None,
    output_path: Name | None = None,
    *,
    return_model: bool = True,
    **flags: Unpack[MixKeywords],
) -> Any: ...
@with_keywords(MergeOptions)
def mix_models(
    model_names_or_paths: Sequence[Name],
    model_type: ModelType,
    weights: Sequence[float] | None,
    output_path: Name | None = None,
    *,
    return_model: bool = True,
    **flags: Any,
) -> Any:
    """Merge models by weights; the arguments and their order are LM-Cocktail's.

    Args:
        model_names_or_paths: two or more folders or hub names.
        model_type: "encoder", "decoder", "reranker" or "encoder-decoder".
        weights: one for each model, with the sum 1; None if `flags` determine them.
        output_path: folder of the merged model; None: it is not kept.
        return_model: load the merged model.
        **flags: further flags of `raybge.merge`, such as `merge_method="slerp"` or `search="dev.jsonl"`; listed below.

    Returns:
        The transformers model as loaded from its folder, or without `return_model` a `MergeResult`.

    Raises:
        UserError: a flag, a file or a model is invalid; raised before any weights are read.
    """
    settings: dict[str, Any] = {"model_names_or_paths": list(model_names_or_paths), "model_type": model_type}
    if weights is not None:
        settings["weights"] = list(map(float, weights))
    return _merge({**settings, "output_path": output_path, **flags}, return_model)


mix_models_by_layers = mix_models  # LM-Cocktail's variant with less memory, which every merge here is


@overload
def mix_models_with_data(
    model_names_or_paths: Sequence[Name],
    model_type: ModelType,
    example_data: Sequence[Mapping[str, Any]] | Name,
    temperature: float = 5.0,
    batch_size: int = 2,
    max_input_length: int = 2048,
    neg_number: int = 7,
    output_path: Name | None = None,
    *,
    return_model: Literal[False],
    **flags: Unpack[MixWithDataKeywords],
) -> MergeResult: ...
@overload
def mix_models_with_data(
    model_names_or_paths: Sequence[Name],
    model_type: ModelType,
    example_data: Sequence[Mapping[str, Any]] | Name,
    temperature: float = 5.0,
    batch_size: int = 2,
    max_input_length: int = 2048,
    neg_number: int = 7,
    output_path: Name | None = None,
    *,
    return_model: bool = True,
    **flags: Unpack[MixWithDataKeywords],
) -> Any: ...
@with_keywords(MergeOptions)
def mix_models_with_data(
    model_names_or_paths: Sequence[Name],
    model_type: ModelType,
    example_data: Sequence[Mapping[str, Any]] | Name,
    temperature: float = 5.0,
    batch_size: int = 2,
    max_input_length: int = 2048,
    neg_number: int = 7,
    output_path: Name | None = None,
    *,
    return_model: bool = True,
    **flags: Any,
) -> Any:
    """Merge models by weights that follow from each model's loss on a few examples.

    Args:
        model_names_or_paths: two or more folders or hub names.
        model_type: "encoder", "decoder" or "encoder-decoder".
        example_data: rows {"query", "pos", "neg"}, or {"input", "output"} for language models; or the path of a file.
        temperature: weights are softmax(-loss / temperature).
        batch_size: examples per batch; a query is contrasted with the passages of its whole batch.
        max_input_length: longest text in tokens.
        neg_number: most negatives of an example.
        output_path: folder of the merged model; None: it is not kept.
        return_model: load the merged model.
        **flags: further flags of `raybge.merge`, listed below.

    Returns:
        As `mix_models`.

    Raises:
        UserError: a flag, a file, an example or a model is invalid.
    """
    settings: dict[str, Any] = {
        "model_names_or_paths": list(model_names_or_paths),
        "model_type": model_type,
        "output_path": output_path,
        "temperature": temperature,
        "batch_size": batch_size,
        "max_input_length": max_input_length,
        "neg_number": neg_number,
        **flags,
    }
    if isinstance(example_data, str | os.PathLike):
        return _merge({**settings, "example_data": example_data}, return_model)
    return _merge(settings, return_model, list(example_data))


def _merge(flags: dict[str, Any], return_model: bool, examples: list[Any] | None = None) -> Any:
    from raybge.merging.run import merge, merge_and_load

    with ExitStack() as stack:
        if return_model and flags["output_path"] is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="raybge-merge-"))
            flags["output_path"] = f"{folder}/model"
        run = partial(merge_and_load if return_model else merge, examples=examples)
        return call_command(MergeOptions, run, flags)
