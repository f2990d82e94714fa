"""Parts of the model cards: README.md of a model's folder, with the front matter that the hub reads.

A card depends on nothing but its fields. Paths are reduced to their last part and secrets are omitted, since a card is
meant to be published. huggingface_hub is imported when a card is written; nothing is read from the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.model.origin import display_name
from raybge.util.filesystem import last_part
from raybge.util.redaction import SECRET_FLAG, redact

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

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
    """Return the section of the flags that were set, without secrets and folders; empty without flags."""
    table = flags_table(flags)
    return f"## Flags\n\n{table}" if table else ""


def flags_table(flags: Mapping[str, Any]) -> str:
    """Return a table of flags and their values, without secrets and folders; empty without flags."""
    rows = [
        [f"`{name}`", _flag_code(name, value)]
        for name, value in sorted(flags.items())
        if not SECRET_FLAG.search(name) and value is not None
    ]
    return markdown_table(["flag", "value"], rows) if rows else ""


def versions_section(versions: Mapping[str, str]) -> str:
    """Return the section of the libraries' versions; empty without versions."""
    if not versions:
        return ""
    return "## Versions\n\n" + "\n".join(f"- {name} {version}" for name, version in sorted(versions.items()))


def table_text(text: str) -> str:
    """Return a text of the data on one line, so that Markdown shows it as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(text.split()))


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    return display_name(value) if _MODEL_FLAGS.search(name) else last_part(value)
