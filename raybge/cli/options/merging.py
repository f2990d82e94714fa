"""Flags of `raybge.merge`."""

from __future__ import annotations

from dataclasses import dataclass

from raybge.cli.options.common import MODEL, RUN, SCALE, CommonOptions, ModelOptions
from raybge.cli.parser import flag

MIXTURE, EXAMPLES, SEARCH = "mixture", "weights from examples", "weights from a search"
TYPES = ("encoder", "decoder", "reranker", "encoder-decoder")


@dataclass(kw_only=True)
class MergeOptions(ModelOptions, CommonOptions):
    """Mix models of one architecture into one, by weights that are given, found by a few examples, or searched."""

    model_names_or_paths: list[str] = flag(..., MODEL, "models to mix, two or more: folders or hub names")
    model_type: str = flag(..., MODEL, "encoder: embedding models; decoder: language models", choices=TYPES)
    base_model: str | None = flag(None, MODEL, "what the others were fine-tuned from, for ties: folder or hub name")
    weights: list[float] | None = flag(None, MIXTURE, "one for each model; their sum is 1")
    merge_method: str = flag(
        "linear",
        MIXTURE,
        "linear: the weighted sum; slerp: along the arc between two models; ties: changes of base_model that agree",
        choices=("linear", "slerp", "ties"),
    )
    ties_density: float = flag(0.2, MIXTURE, "share of each tensor's changes, the largest, that ties keeps")
    output_path: str | None = flag(
        None, RUN, "folder for the mixture; left out, weights from examples or a search are only printed"
    )
    overwrite: bool = flag(False, RUN, "replace the model that is in output_path")

    example_data: list[str] | None = flag(
        None,
        EXAMPLES,
        "a few examples, {query, pos, neg} or for language models {input, output}: each model's weight follows from "
        "its loss on them",
    )
    temperature: float = flag(5.0, EXAMPLES, "weights are softmax(-loss / temperature)")
    batch_size: int = flag(2, EXAMPLES, "examples at a time; a query sees the passages of all of them")
    max_input_length: int = flag(2048, EXAMPLES, "longest text in tokens; at most what an embedding model holds")
    neg_number: int = flag(7, EXAMPLES, "negatives of an example at most")
    seed: int = flag(42, EXAMPLES, "seed of the choice among more negatives")

    search: list[str] | None = flag(
        None, SEARCH, "queries with their answers {query, pos}: weights are searched that do best on them, by nDCG@10"
    )
    search_corpus: list[str] | None = flag(
        None, SEARCH, "passages {text} to find them in; left out: every `pos` and `neg` of search"
    )
    general: list[str] | None = flag(None, SEARCH, "a second set, on which the mixture must not lose too much")
    general_corpus: list[str] | None = flag(None, SEARCH, "its passages; left out: every `pos` and `neg` of general")
    general_floor: float = flag(
        0.98, SEARCH, "the share of the best single model's nDCG@10 on general that must be reached"
    )
    max_evaluations: int = flag(30, SEARCH, "mixtures that are measured at most")
    storage_path: str | None = flag(
        None, SCALE, "folder that all nodes share, for the mixtures of a search while it runs; left out: beside output"
    )
