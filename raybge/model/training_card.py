"""Model card of a training result; see `raybge.model.card`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raybge.model.card import (
    USAGE,
    card_text,
    evenly_spaced,
    flags_section,
    flags_table,
    format_number,
    markdown_table,
    table_text,
    versions_section,
)
from raybge.model.citations import citations_section
from raybge.model.folder import FolderSettings
from raybge.model.origin import ModelOrigin
from raybge.report.text import excerpt
from raybge.util.filesystem import last_part
from raybge.util.redaction import redact

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from raybge.data.row_sample import RowSample

MAX_ROWS = 20  # of the loss curve's table, and of the evaluations'
_PRETRAINED = (
    "An encoder pre-trained with raybge.pretrain ([RetroMAE](https://arxiv.org/abs/2205.12035)): its vector of a text "
    "encodes the words of the text. It is a starting point of fine-tuning for retrieval and retrieves little by itself."
)
_POOLINGS = {"cls": "first token (CLS)", "mean": "mean of all tokens", "last_token": "last token"}


class CardMetric(Protocol):
    """A metric before and after training, with the 95% interval of the difference: `MetricChange` of an evaluation."""

    @property
    def metric(self) -> str:
        """Name of the metric."""

    @property
    def before(self) -> float | None:
        """Mean before training; None if unknown."""

    @property
    def after(self) -> float | None:
        """Mean after training; None if unknown."""

    @property
    def low(self) -> float | None:
        """Lower end of the interval; None if unknown."""

    @property
    def high(self) -> float | None:
        """Upper end of the interval; None if unknown."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Metric, before, after, difference, interval and verdict."""


@dataclass(frozen=True)
class HeldOutData:
    """Data of the evaluation in training.

    Args:
        name: Names of the files with queries.
        queries: Number of queries.
        passages: Number of passages in the corpus; None if it consists of the passages of the queries.
    """

    name: str
    queries: int
    passages: int | None = None


@dataclass(frozen=True)
class TrainingCard:
    """Card of a fine-tuned or pre-trained model. Fields that are empty or None are omitted from it.

    Args:
        base: The base model; None if trained from scratch.
        data: Name and number of rows of each data set.
        flags: Flags that were set, and those whose value the run determined, by name.
        history: `log_history` of transformers' Trainer.
        metrics: Metrics before and after training.
        versions: Versions of libraries by name.
        command: "train", or "pretrain" for an encoder that is to be fine-tuned.
        license: The model's license, an identifier of the hub.
        languages: Languages of the texts, as ISO 639 codes.
        held_out: Data that `metrics` were measured on.
        settings: Settings of the model's folder.
        width: Width of a vector.
        lengths: Most tokens of the texts in training by kind, such as "queries".
        sample: Sample of the training rows.
        hyperparameters: All flags and arguments that the weights depend on, by name.
        training: Names and values of steps, hardware and time.
        weight_versions: Table with its head: evaluations of the last and of averaged weights.
    """

    base: ModelOrigin | None
    data: Sequence[tuple[str, int]] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[dict[str, Any]] = ()
    metrics: Sequence[CardMetric] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = "train"
    license: str | None = None
    languages: Sequence[str] = ()
    held_out: HeldOutData | None = None
    settings: FolderSettings | None = None
    width: int | None = None
    lengths: Mapping[str, int] = field(default_factory=dict)
    sample: RowSample | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    training: Sequence[tuple[str, str]] = ()
    weight_versions: Sequence[list[str]] = ()

    def write(self, folder: Path) -> None:
        """Write the card as README.md of a model's folder."""
        (Path(folder) / "README.md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Return the card in Markdown, front matter first."""
        return card_text(
            self._metadata(),
            [
                self._opening(),
                self._model(),
                USAGE,
                self._results(),
                self._data(),
                self._training(),
                self._loss(),
                self._evaluations(),
                flags_section(self.flags),
                versions_section(self.versions),
                citations_section(self.command, self.hyperparameters) if self.hyperparameters else "",
            ],
        )

    def _metadata(self) -> ModelCardData:
        from huggingface_hub import ModelCardData

        base = self.base.hub_name if self.base else None
        adapters = self.settings is not None and self.settings.base is not None
        languages = list(self.languages)
        results = self._eval_results()
        return ModelCardData(
            language=languages if len(languages) > 1 else next(iter(languages), None),
            license=self.license,
            base_model=base,
            base_model_relation=None if base is None else "adapter" if adapters else "finetune",
            library_name="sentence-transformers",
            pipeline_tag="sentence-similarity",
            tags=["sentence-transformers", "feature-extraction", "sentence-similarity", "raybge"],
            model_name=self._title() if results else None,
            eval_results=results or None,
        )

    def _eval_results(self) -> list[EvalResult]:
        from huggingface_hub import EvalResult

        held_out, results = self.held_out, []
        for each in self.metrics:
            before, after, low, high = (_finite(value) for value in (each.before, each.after, each.low, each.high))
            if after is None:
                continue
            arguments: dict[str, Any] = {}
            if before is not None:
                arguments = {"before_training": before, "difference": after - before}
            if low is not None and high is not None:
                arguments["difference_95_percent_interval"] = [low, high]
            sizes = {"queries": held_out.queries, "passages": held_out.passages} if held_out else {}
            results.append(
                EvalResult(
                    task_type="information-retrieval",
                    task_name="Information Retrieval",
                    dataset_type="unknown",
                    dataset_name=held_out.name if held_out else "held-out queries",
                    dataset_args={name: size for name, size in sizes.items() if size is not None} or None,
                    metric_type=each.metric,
                    metric_name=each.metric,
                    metric_value=after,
                    metric_args=arguments or None,
                )
            )
        return results

    def _title(self) -> str:
        if self.base is None:
            return "Pre-trained for retrieval"
        name = self.base.name.rsplit("/", 1)[-1]
        return f"{name}, {'pre-trained for retrieval' if self.command == 'pretrain' else 'fine-tuned'}"

    def _opening(self) -> str:
        title = f"# {table_text(self._title())}\n\n"
        if self.base is None:
            return f"{title}{_PRETRAINED} Trained from scratch with raybge."
        name, hub_name = self.base.name, self.base.hub_name
        link = f"[{hub_name}](https://huggingface.co/{hub_name})" if hub_name else ""
        base = link if hub_name == name else f"`{name}`" + (f", which is based on {link}," if link else "")
        if self.command == "pretrain":
            return f"{title}{_PRETRAINED} The initial weights are those of {base.rstrip(',')}."
        return (
            f"{title}An embedding model: it maps texts to vectors, and a query and its answer to similar vectors. "
            f"Fine-tuned from {base} with raybge."
        )

    def _model(self) -> str:
        """Return the section of what the model's folder states, and of the lengths that were trained."""
        settings = self.settings
        if settings is None:
            return ""
        normalized = "normalized to length 1, similarity: cosine" if settings.normalize else "similarity: inner product"
        width = f"{self.width:,} dimensions, " if self.width else ""
        rows = [["vector", width + normalized], ["pooling", _POOLINGS.get(settings.pooling, settings.pooling)]]
        if settings.max_length:
            rows.append(["maximum length", f"{settings.max_length:,} tokens"])
        if self.lengths:
            trained = ", ".join(f"{kind} up to {length:,} tokens" for kind, length in self.lengths.items())
            rows.append(["trained lengths", trained])
        rows += [[f"prompt «{table_text(name)}»", table_text(text)] for name, text in settings.prompts.items() if text]
        rows.append(["license", self.license or "not stated: add `license` to the metadata of this card"])
        rows.append(["languages", ", ".join(self.languages) or "not stated: add `language` to the metadata"])
        return "## Model\n\n" + markdown_table(["property", "value"], rows)

    def _results(self) -> str:
        if not self.metrics:
            return ""
        rows = [list(each.texts) for each in self.metrics]
        note = ""
        if held_out := self.held_out:
            corpus = f"{held_out.passages:,} passages" if held_out.passages else "all passages of these queries' rows"
            note = f"{held_out.queries:,} held-out queries of {held_out.name}, searched in {corpus}. "
        if any(each.low is not None for each in self.metrics):
            note += "95% interval of the difference: paired bootstrap over the queries."
        heads = ["metric", "before", "after", "difference", "95% interval", "verdict"]
        versions = markdown_table(self.weight_versions[0], self.weight_versions[1:]) if self.weight_versions else ""
        return "\n\n".join(filter(None, ["## Results", note.strip(), markdown_table(heads, rows), versions]))

    def _data(self) -> str:
        if not self.data:
            return ""
        rows = [[f"`{last_part(redact(name))}`", f"{count:,}"] for name, count in self.data]
        if len(rows) > 1:
            rows.append(["all", f"{sum(count for _, count in self.data):,}"])
        groups = "Groups of a query, passages that answer it and passages that do not."
        content = "Texts." if self.command == "pretrain" else groups
        parts = ["## Training data", content, markdown_table(["data set", "rows"], rows)]
        return "\n\n".join([*parts, *(_sample_parts(self.sample) if self.sample and self.sample.rows else [])])

    def _training(self) -> str:
        table = flags_table(self.hyperparameters)
        parts = [markdown_table(["property", "value"], [list(each) for each in self.training])] if self.training else []
        if table:
            parts.append(f"### All hyper-parameters\n\n<details><summary>Show</summary>\n\n{table}\n\n</details>")
        return "\n\n".join(["## Training", *parts]) if parts else ""

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


def _sample_parts(sample: RowSample) -> list[str]:
    """Return the lengths of the texts and the examples in Markdown."""
    lengths = [
        [each.field, f"{each.texts:,}", f"{each.shortest:,}", f"{each.mean:,.1f}", f"{each.longest:,}"]
        for each in sample.lengths
    ]
    heads = ["text", "number", "shortest", "mean", "longest"]
    note = f"Lengths in tokens, without truncation, in a sample of {sample.rows:,} rows:"
    names = list(dict.fromkeys(name for example in sample.examples for name in example))
    rows = [[table_text(excerpt(example.get(name, ""))) for name in names] for example in sample.examples]
    return [note, markdown_table(heads, lengths), "Examples:", markdown_table(names, rows)]


def _finite(value: float | None) -> float | None:
    """Return None in place of inf and nan, which the hub refuses."""
    return value if value is not None and math.isfinite(value) else None


def _is_metric(name: str) -> bool:
    """Return True for a metric of an evaluation, False for its duration and speed."""
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_time"))
