"""The model card of a mixture. As every card, it is a pure function of what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raybge.model.card import USE, base_name, flags_table, number, on_hub, table, versions_list

_SETS = ("target", "general")
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
class MixtureCard:
    """What a reader of a mixture wants to know.

    Args:
        models: names on the hub or paths, of which the last part is shown, with their weights.
        method: "linear", "slerp" or "ties".
        losses: of each model on the examples that the weights come from; none: they come from elsewhere.
        measured: of a search, `metric` on the `target` and the `general` set, and how many `evaluations` it took.
    """

    model_type: str
    models: Sequence[tuple[str, float]]
    method: str = "linear"
    losses: Sequence[float] = ()
    metric: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the card as README.md of a model's folder."""
        (Path(folder) / "README.md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The card in Markdown, front matter first."""
        use = USE if self.model_type == "encoder" else ""
        parts = [self._front_matter(), self._opening(), use, self._weights(), flags_table(self.flags)]
        return "\n\n".join(part.strip() for part in [*parts, versions_list(self.versions)] if part) + "\n"

    def _front_matter(self) -> str:
        library, task, _ = _KINDS[self.model_type]
        about: dict[str, Any] = {"library_name": library, "pipeline_tag": task, "tags": [library, "merge", "raybge"]}
        if bases := [name for name, _ in self.models if on_hub(name)]:
            about["base_model"] = bases
        return f"---\n{yaml.safe_dump(about, sort_keys=False)}---"

    def _opening(self) -> str:
        names = [base_name(name) for name, _ in self.models]
        title = " and ".join(name.rsplit("/", 1)[-1] for name in names)
        kind = _KINDS[self.model_type][2]
        return f"# {title}, mixed\n\n{kind}: {_METHODS[self.method]}, made with raybge."

    def _weights(self) -> str:
        rows = [[f"`{base_name(name)}`", number(weight)] for name, weight in self.models]
        heads = ["model", "weight"]
        said = ""
        if self.losses:
            heads.append("loss")
            rows = [[*row, number(loss)] for row, loss in zip(rows, self.losses, strict=True)]
            said = "Weights follow from the models' losses on a few examples: softmax(-loss / temperature)."
        if self.measured:
            sets = [f"{number(self.measured[name])} on the {name} set" for name in _SETS if name in self.measured]
            said = f"Found by a search, {self.measured['evaluations']} mixtures measured: {self.metric} "
            said += f"{' and '.join(sets)}."
        return "## Weights\n\n" + "\n\n".join(filter(None, [said, table(heads, rows)]))
