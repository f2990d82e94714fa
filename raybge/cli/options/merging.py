"""Options of `raybge.merge`."""

from __future__ import annotations

from dataclasses import dataclass

from raybge.cli.flag import flag
from raybge.cli.options.common import (
    EXAMPLES,
    MERGE,
    MODEL,
    RUN,
    SCALE,
    WEIGHT_SEARCH,
    CommonOptions,
    ModelOptions,
)

TYPES = ("encoder", "decoder", "reranker", "encoder-decoder")


@dataclass(kw_only=True)
class MergeOptions(ModelOptions, CommonOptions):
    """Merge models of one architecture; the weights are given, derived from examples, or searched."""

    model_names_or_paths: list[str] = flag(..., MODEL, "models to merge, two or more: folders or hub names")
    model_type: str = flag(..., MODEL, "encoder: embedding models; decoder: language models", choices=TYPES)
    base_model: str | None = flag(None, MODEL, "common base model of the others, required by ties: folder or hub name")
    weights: list[float] | None = flag(None, MERGE, "weight of each model; the sum is 1")
    merge_method: str = flag(
        "linear",
        MERGE,
        "linear: weighted sum; slerp: spherical interpolation of two models; ties: changes to base_model whose signs "
        "agree",
        choices=("linear", "slerp", "ties"),
    )
    ties_density: float = flag(0.2, MERGE, "share of each tensor's largest changes that ties keeps")
    output_path: str | None = flag(
        None, RUN, "folder for the merged model; if unset, weights from examples or a search are printed only"
    )
    overwrite: bool = flag(False, RUN, "replace an existing model in output_path")

    example_data: list[str] | None = flag(
        None,
        EXAMPLES,
        "examples {query, pos, neg}, or {input, output} for language models; the loss on them determines each "
        "model's weight",
    )
    temperature: float = flag(5.0, EXAMPLES, "the weights are softmax(-loss / temperature)")
    batch_size: int = flag(2, EXAMPLES, "examples per batch; each query is compared with all passages of its batch")
    max_input_length: int = flag(2048, EXAMPLES, "maximum text length in tokens, limited by the model's own maximum")
    neg_number: int = flag(7, EXAMPLES, "maximum negatives per example")
    seed: int = flag(42, EXAMPLES, "seed for choosing among more negatives")

    search: list[str] | None = flag(
        None, WEIGHT_SEARCH, "queries {query, pos} on which the weights with the best nDCG@10 are searched"
    )
    search_corpus: list[str] | None = flag(
        None, WEIGHT_SEARCH, "corpus {text} of search; default: every `pos` and `neg` of search"
    )
    general: list[str] | None = flag(
        None, WEIGHT_SEARCH, "queries {query, pos} of a second set, on which nDCG@10 must stay above general_floor"
    )
    general_corpus: list[str] | None = flag(
        None, WEIGHT_SEARCH, "corpus {text} of general; default: every `pos` and `neg` of general"
    )
    general_floor: float = flag(
        0.98, WEIGHT_SEARCH, "minimum nDCG@10 on general, as a share of the best single model's"
    )
    max_evaluations: int = flag(30, WEIGHT_SEARCH, "maximum number of evaluated candidates")
    storage_path: str | None = flag(
        None, SCALE, "shared folder for the candidates of a running search; default: next to output_path"
    )
