"""Model card of a training result: README.md with the front matter that the hub reads.

A card depends on nothing but its fields. Paths are reduced to their last part and secrets are omitted, since a card is
meant to be published. huggingface_hub is imported when a card is written; nothing is read from the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.util.redaction import SECRET_FLAG, redact

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

MAX_ROWS = 20  # of the loss curve's table, and of the evaluations'
_PRETRAINED = (
    "An encoder pre-trained with raybge.pretrain ([RetroMAE](https://arxiv.org/abs/2205.12035)): its vector of a text "
    "encodes the words of the text. It is a starting point of fine-tuning for retrieval and retrieves little by itself."
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TEXT_FLAGS = re.compile(r"instruction|prompt")  # their values may contain a slash but are not paths
_MODEL_FLAGS = re.compile(r"(model_names?_or_paths?|base_model|config_name|tokenizer_name|guide_model|hub_model_id)$")
USAGE = """## How to use it

With sentence-transformers, which applies the prompts for queries and passages if the model has any:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/of/this/folder")
queries = model.encode_query(["what is a lane?"])
passages = model.encode_document(["A lane is a part of the road."])
scores = model.similarity(queries, passages)
```

With raybge:

```python
import raybge

encoder = raybge.Encoder("path/of/this/folder")
scores = encoder.encode_queries(["what is a lane?"]) @ encoder.encode_corpus(["A lane is a part of the road."]).T
```"""


@dataclass(frozen=True)
class TrainingCard:
    """Card of a fine-tuned or pre-trained model.

    Args:
        base_model: Hub name, or an absolute path, of which the last part is shown; None if trained from scratch.
        data: Name and number of rows of each data set.
        flags: Flags that were set, and those whose value the run determined, by name.
        history: `log_history` of transformers' Trainer.
        before: Metrics of the base model; None if not measured.
        after: Metrics of the result; None if not measured.
        versions: Versions of libraries by name.
        command: "train", or "pretrain" for an encoder that is to be fine-tuned.
        changes: Metrics before and after as rows of the report's table: metric, before, after, difference, interval,
            verdict.
    """

    base_model: str | None
    data: list[tuple[str, int]]
    flags: dict[str, Any]
    history: list[dict[str, Any]]
    before: dict[str, float] | None
    after: dict[str, float] | None
    versions: dict[str, str]
    command: str = "train"
    changes: Sequence[Sequence[str]] = ()

    def write(self, folder: Path) -> None:
        """Write the card as README.md of a model's folder."""
        (Path(folder) / "README.md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Return the card in Markdown, front matter first."""
        return card_text(
            self._metadata(),
            [
                self._opening(),
                USAGE,
                self._metrics(),
                self._data(),
                self._loss(),
                self._evaluations(),
                flags_section(self.flags),
                versions_section(self.versions),
            ],
        )

    def _metadata(self) -> ModelCardData:
        from huggingface_hub import EvalResult, ModelCardData

        results = [
            EvalResult(
                task_type="information-retrieval",
                dataset_type="unknown",
                dataset_name="held-out queries",
                metric_type=name,
                metric_value=value,
            )
            for name, value in (self.after or {}).items()
        ]
        return ModelCardData(
            base_model=self.base_model if self.base_model is not None and is_hub_name(self.base_model) else None,
            library_name="sentence-transformers",
            pipeline_tag="sentence-similarity",
            tags=["sentence-transformers", "feature-extraction", "sentence-similarity", "raybge"],
            model_name=self._title() if results else None,
            eval_results=results or None,
        )

    def _title(self) -> str:
        if self.base_model is None:
            return "Pre-trained for retrieval"
        name = display_name(self.base_model).rsplit("/", 1)[-1]
        return f"{name}, {'pre-trained for retrieval' if self.command == 'pretrain' else 'fine-tuned'}"

    def _opening(self) -> str:
        title = f"# {self._title()}\n\n"
        if self.base_model is None:
            return f"{title}{_PRETRAINED} Trained from scratch with raybge."
        link = f"[{self.base_model}](https://huggingface.co/{self.base_model})"
        base = link if is_hub_name(self.base_model) else f"`{display_name(self.base_model)}`"
        if self.command == "pretrain":
            return f"{title}{_PRETRAINED} The initial weights are those of {base}."
        return (
            f"{title}An embedding model: it maps texts to vectors, and a query and its answer to similar vectors. "
            f"Fine-tuned from {base} with raybge."
        )

    def _metrics(self) -> str:
        if self.changes:
            heads = ["metric", "before", "after", "difference", "95% interval", ""]
            return "## Results\n\n" + markdown_table(heads, self.changes)
        if not self.before and not self.after:
            return ""
        before, after = self.before or {}, self.after or {}
        rows = [[name, format_number(before.get(name)), format_number(after.get(name))] for name in {**before, **after}]
        return "## Results\n\n" + markdown_table(["metric", "before", "after"], rows)

    def _data(self) -> str:
        if not self.data:
            return ""
        rows = [[f"`{display_name(name)}`", f"{count:,}"] for name, count in self.data]
        if len(rows) > 1:
            rows.append(["all", f"{sum(count for _, count in self.data):,}"])
        groups = "Groups of a query, passages that answer it and passages that do not."
        content = "Texts." if self.command == "pretrain" else groups
        return f"## Training data\n\n{content}\n\n" + markdown_table(["data set", "rows"], rows)

    def _loss(self) -> str:
        entries = [entry for entry in self.history if "loss" in entry]
        if not entries:
            return ""
        names = ["step", "epoch", "loss", "learning_rate"]
        rows = [[format_number(entry.get(name)) for name in names] for entry in evenly_spaced(entries, MAX_ROWS)]
        return "## Loss while training\n\n" + markdown_table([name.replace("_", " ") for name in names], rows)

    def _evaluations(self) -> str:
        entries = [entry for entry in self.history if any(_is_metric(name) for name in entry)]
        if not entries:
            return ""
        metrics = list(dict.fromkeys(name for entry in entries for name in entry if _is_metric(name)))
        names = ["step", "epoch", *metrics]
        rows = [[format_number(entry.get(name)) for name in names] for entry in evenly_spaced(entries, MAX_ROWS)]
        heads = [name.removeprefix("eval_") for name in names]
        return "## Evaluation while training\n\n" + markdown_table(heads, rows)


def _is_metric(name: str) -> bool:
    """Return True for a metric of an evaluation, False for its duration and speed."""
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_time"))


# --- parts of all cards -----------------------------------------------------------------------------------------------


def card_text(metadata: ModelCardData, sections: Sequence[str]) -> str:
    """Join front matter and sections to a card that huggingface_hub parses; empty sections are omitted.

    Args:
        metadata: The front matter.
        sections: Sections in Markdown.

    Returns:
        The card.
    """
    from huggingface_hub import ModelCard

    body = "\n\n".join(section.strip() for section in sections if section)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"))


def flags_section(flags: Mapping[str, Any]) -> str:
    """Return the section of the flags, without secrets and folders; empty without flags."""
    rows = [
        [f"`{name}`", _flag_code(name, value)]
        for name, value in sorted(flags.items())
        if not SECRET_FLAG.search(name) and value is not None
    ]
    return "## Flags\n\n" + markdown_table(["flag", "value"], rows) if rows else ""


def versions_section(versions: Mapping[str, str]) -> str:
    """Return the section of the libraries' versions; empty without versions."""
    if not versions:
        return ""
    return "## Versions\n\n" + "\n".join(f"- {name} {version}" for name, version in sorted(versions.items()))


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def is_hub_name(name: str) -> bool:
    """Return True if the text has the form of a hub name; a relative path may have it, too."""
    return _HUB_NAME.fullmatch(name) is not None and not name.startswith(".")


def display_name(path: str) -> str:
    """Return the last part of a path or URI; a hub name is returned unchanged."""
    if is_hub_name(path):
        return path
    path = redact(path)
    return _last_part(path) or path


def evenly_spaced(entries: Sequence[Mapping[str, Any]], max_entries: int) -> list[Mapping[str, Any]]:
    """Return at most `max_entries` entries at equal distances, including the first and the last."""
    if len(entries) <= max_entries:
        return list(entries)
    return [entries[round(i * (len(entries) - 1) / (max_entries - 1))] for i in range(max_entries)]


def format_number(value: Any) -> str:
    """Format a metric or a count for a table."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else f"{value:,}"


def _flag_code(name: str, value: Any) -> str:
    """Format a flag's value as code in a table cell."""
    text = json.dumps(_without_paths(name, value), ensure_ascii=False, default=str)
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}".replace("|", "\\|")


def _without_paths(name: str, value: Any) -> Any:
    """Reduce paths in a flag's value to their last part, and remove nested secrets."""
    if isinstance(value, dict):
        return {key: _without_paths(key, each) for key, each in value.items() if not SECRET_FLAG.search(str(key))}
    if isinstance(value, list | tuple):
        return [_without_paths(name, each) for each in value]
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    value = redact(value)
    if _TEXT_FLAGS.search(name):
        return value
    return display_name(value) if _MODEL_FLAGS.search(name) else _last_part(value)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
