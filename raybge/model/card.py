"""The model card of a result: README.md with the front matter that the hub reads. Nothing in it is made up.

A card is a pure function of what it is given. Paths are cut to their last part and tokens are left out: a card is made
to be published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raybge.util.redaction import SECRET_FLAG, redact

_PRETRAINED = (
    "An encoder whose vector of a text holds what its words were, made with raybge.pretrain "
    "([RetroMAE](https://arxiv.org/abs/2205.12035)). It is where fine-tuning for retrieval starts: by itself it finds "
    "little."
)
MAX_ROWS = 20  # of the loss curve's table, and of the evaluation's
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TEXTS = re.compile(r"instruction|prompt")  # flags whose values may hold a slash and are no path
_NAMES = re.compile(r"(model_names?_or_paths?|base_model|config_name|tokenizer_name|guide_model|hub_model_id)$")


@dataclass(frozen=True)
class TrainingCard:
    """What a reader of a model wants to know.

    Args:
        base_model: name on the hub, or an absolute path, of which the last part is shown; None: from scratch.
        data: name and rows of each data set.
        flags: those that were given and those whose value the run chose, by name.
        history: `log_history` of transformers' Trainer.
        before, after: metrics of the base model and of the result; None: not measured.
        versions: of the libraries.
        command: "train", or "pretrain" for an encoder that is to be fine-tuned.
    """

    base_model: str | None
    data: list[tuple[str, int]]
    flags: dict[str, Any]
    history: list[dict[str, Any]]
    before: dict[str, float] | None
    after: dict[str, float] | None
    versions: dict[str, str]
    command: str = "train"

    def write(self, folder: Path) -> None:
        """Write the card as README.md of a model's folder."""
        (Path(folder) / "README.md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The card in Markdown, front matter first."""
        sections = [
            self._front_matter(),
            self._opening(),
            USE,
            self._metrics(),
            self._data(),
            self._curve(),
            self._evaluations(),
            flags_table(self.flags),
            versions_list(self.versions),
        ]
        return "\n\n".join(section.strip() for section in sections if section) + "\n"

    def _front_matter(self) -> str:
        about: dict[str, Any] = {
            "library_name": "sentence-transformers",
            "pipeline_tag": "sentence-similarity",
            "tags": ["sentence-transformers", "feature-extraction", "sentence-similarity", "raybge"],
        }
        if self.base_model is not None and on_hub(self.base_model):
            about["base_model"] = self.base_model
        return f"---\n{yaml.safe_dump(about, sort_keys=False)}---"

    def _opening(self) -> str:
        if self.base_model is None:
            return f"# Pre-trained for retrieval\n\n{_PRETRAINED} Trained from scratch with raybge."
        name = base_name(self.base_model)
        link = f"[{self.base_model}](https://huggingface.co/{self.base_model})"
        base = link if on_hub(self.base_model) else f"`{name}`"
        title = name.rsplit("/", 1)[-1]
        if self.command == "pretrain":
            return f"# {title}, pre-trained for retrieval\n\n{_PRETRAINED} It began as {base}."
        return (
            f"# {title}, fine-tuned\n\nAn embedding model: texts become vectors, near one another where one answers "
            f"the other. Fine-tuned from {base} with raybge."
        )

    def _metrics(self) -> str:
        if not self.before and not self.after:
            return ""
        before, after = self.before or {}, self.after or {}
        rows = [[name, number(before.get(name)), number(after.get(name))] for name in {**before, **after}]
        return "## Results\n\n" + table(["metric", "before", "after"], rows)

    def _data(self) -> str:
        if not self.data:
            return ""
        rows = [[f"`{base_name(name)}`", f"{count:,}"] for name, count in self.data]
        if len(rows) > 1:
            rows.append(["all", f"{sum(count for _, count in self.data):,}"])
        groups = "Groups of a query, passages that answer it and passages that do not."
        what = "Texts." if self.command == "pretrain" else groups
        return f"## Training data\n\n{what}\n\n" + table(["data set", "rows"], rows)

    def _curve(self) -> str:
        entries = [entry for entry in self.history if "loss" in entry]
        if not entries:
            return ""
        names = ["step", "epoch", "loss", "learning_rate"]
        rows = [[number(entry.get(name)) for name in names] for entry in thinned(entries, MAX_ROWS)]
        return "## Loss while training\n\n" + table([name.replace("_", " ") for name in names], rows)

    def _evaluations(self) -> str:
        entries = [entry for entry in self.history if any(_is_metric(name) for name in entry)]
        if not entries:
            return ""
        metrics = list(dict.fromkeys(name for entry in entries for name in entry if _is_metric(name)))
        names = ["step", "epoch", *metrics]
        rows = [[number(entry.get(name)) for name in names] for entry in thinned(entries, MAX_ROWS)]
        heads = [name.removeprefix("eval_") for name in names]
        return "## Evaluation while training\n\n" + table(heads, rows)


USE = """## How to use it

With sentence-transformers; each side's prompt, if the model has one, is put in front by itself:

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


def flags_table(flags: Mapping[str, Any]) -> str:
    """The section of the flags, without secrets and folders."""
    rows = [
        [f"`{name}`", _shown(name, value)]
        for name, value in sorted(flags.items())
        if not SECRET_FLAG.search(name) and value is not None
    ]
    return "## Flags\n\n" + table(["flag", "value"], rows) if rows else ""


def versions_list(versions: Mapping[str, str]) -> str:
    """The section of the libraries' versions."""
    if not versions:
        return ""
    return "## Versions\n\n" + "\n".join(f"- {name} {version}" for name, version in sorted(versions.items()))


def on_hub(name: str) -> bool:
    """Whether it looks like a name on the hub; a path that does too is taken for one."""
    return _HUB_NAME.fullmatch(name) is not None and not name.startswith(".")


def base_name(path: str) -> str:
    """The last part of a path or URI; a name on the hub as it is."""
    if on_hub(path):
        return path
    path = redact(path)
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


def thinned(entries: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most `most` entries at even distances, first and last among them."""
    if len(entries) <= most:
        return list(entries)
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]


def _is_metric(name: str) -> bool:
    """A metric of an evaluation, and not how long it took."""
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_time"))


def number(value: Any) -> str:
    """A metric or a count for a table."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else f"{value:,}"


def _shown(name: str, value: Any) -> str:
    """A flag's value as code in a table's cell."""
    text = json.dumps(_without_paths(name, value), ensure_ascii=False, default=str)
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}".replace("|", "\\|")


def _without_paths(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(key, each) for key, each in value.items() if not SECRET_FLAG.search(str(key))}
    if isinstance(value, list | tuple):
        return [_without_paths(name, each) for each in value]
    if isinstance(value, Path):
        value = str(value)
    value = redact(value) if isinstance(value, str) else value
    if not isinstance(value, str) or _TEXTS.search(name):
        return value
    return base_name(value) if _NAMES.search(name) else re.split(r"[/\\]", value.rstrip("/\\"))[-1]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
