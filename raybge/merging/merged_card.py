"""Model card of a merged model; see `raybge.model.card`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.model.card import (
    USAGE,
    card_text,
    flags_section,
    format_number,
    markdown_table,
    versions_section,
)
from raybge.model.origin import ModelOrigin, display_name

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

_SETS = ("target", "general")
# Library, pipeline tag and description by model type.
_KINDS = {
    "encoder": ("sentence-transformers", "sentence-similarity", "An embedding model"),
    "decoder": ("transformers", "text-generation", "A language model"),
    "reranker": ("transformers", "text-ranking", "A model that scores a query and a passage together"),
    "encoder-decoder": ("transformers", "text2text-generation", "A language model of an encoder and a decoder"),
}
_METHODS = {
    "linear": "the weighted sum of the models' weights ([LM-Cocktail](https://arxiv.org/abs/2311.13534))",
    "slerp": "spherical linear interpolation of the models' weights, tensor by tensor",
    "ties": "changes of the base model, trimmed and merged where their signs agree "
    "([TIES](https://arxiv.org/abs/2306.01708))",
}


@dataclass(frozen=True)
class MergedModelCard:
    """Card of a merged model.

    Args:
        model_type: "encoder", "decoder", "reranker" or "encoder-decoder".
        models: Hub names or paths, of which the last part is shown, with their weights.
        method: "linear", "slerp" or "ties".
        losses: Loss of each model on the examples; empty if the weights have another origin.
        metric: Metric of a search.
        search_results: The search's metric on the `target` and the `general` set, and its number of `evaluations`.
        flags: Flags that were set, by name.
        versions: Versions of libraries by name.
        origins: Origins of the models, in their order; empty: as the names state them.
    """

    model_type: str
    models: Sequence[tuple[str, float]]
    method: str = "linear"
    losses: Sequence[float] = ()
    metric: str = ""
    search_results: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    origins: Sequence[ModelOrigin] = ()

    def write(self, folder: Path) -> None:
        """Write the card as README.md of a model's folder."""
        (Path(folder) / "README.md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Return the card in Markdown, front matter first."""
        usage = USAGE if self.model_type == "encoder" else ""
        sections = [self._opening(), usage, self._weights(), flags_section(self.flags), versions_section(self.versions)]
        return card_text(self._metadata(), sections)

    def _metadata(self) -> ModelCardData:
        from huggingface_hub import ModelCardData

        library, task, _ = _KINDS[self.model_type]
        origins = self.origins or [ModelOrigin.of(name) for name, _ in self.models]
        bases = list(dict.fromkeys(each.hub_name for each in origins if each.hub_name))
        licenses = {each.license for each in origins}
        languages = list(dict.fromkeys(language for each in origins for language in each.languages))
        return ModelCardData(
            language=languages or None,
            license=licenses.pop() if len(licenses) == 1 else None,
            base_model=bases or None,
            base_model_relation="merge" if bases else None,
            library_name=library,
            pipeline_tag=task,
            tags=[library, "merge", "raybge"],
        )

    def _opening(self) -> str:
        names = [display_name(name) for name, _ in self.models]
        title = " and ".join(name.rsplit("/", 1)[-1] for name in names)
        kind = _KINDS[self.model_type][2]
        return f"# {title}, merged\n\n{kind}: {_METHODS[self.method]}, computed with raybge."

    def _weights(self) -> str:
        rows = [[f"`{display_name(name)}`", format_number(weight)] for name, weight in self.models]
        heads = ["model", "weight"]
        origin = ""
        if self.losses:
            heads.append("loss")
            rows = [[*row, format_number(loss)] for row, loss in zip(rows, self.losses, strict=True)]
            origin = "Computed from the models' losses on a few examples: softmax(-loss / temperature)."
        if self.search_results:
            results = self.search_results
            sets = [f"{format_number(results[name])} on the {name} set" for name in _SETS if name in results]
            origin = f"Determined by a search that evaluated {results['evaluations']} candidates: {self.metric} "
            origin += f"{' and '.join(sets)}."
        return "## Weights\n\n" + "\n\n".join(filter(None, [origin, markdown_table(heads, rows)]))
