"""Origin of a trained model as its card states it: the base model, its license and its languages; no local path."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybge.model.folder import model_file
from raybge.util.filesystem import last_part
from raybge.util.redaction import redact

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\][0-9a-f]+[/\\]?$")  # folder in the hub's cache


@dataclass(frozen=True)
class ModelOrigin:
    """Base model of a training run.

    Args:
        name: Hub name, or the last part of a local path.
        hub_name: The model on the hub: itself, or for a local folder the base model that the folder's card names; None
            if unknown.
        license: License of the base model, as its card states it.
        languages: Languages of the base model, as its card states them.
    """

    name: str
    hub_name: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()

    @classmethod
    def of(cls, path: str, cache_dir: str | None = None, token: str | bool | None = None) -> ModelOrigin:
        """Read the card of a model: README.md of its folder, or on the hub.

        Args:
            path: A folder, or a name on the hub.
            cache_dir: Folder for models from the hub.
            token: Access token for the hub.

        Returns:
            The origin; without license and languages if the model has no card, or one that cannot be read.
        """
        card = _front_matter(model_file(path, "README.md", cache_dir, token))
        cached = _CACHED.search(path)
        hub_name: str | None
        if cached:
            name = "/".join(cached.groups())
            hub_name = name
        elif os.path.isdir(path):
            name = display_name(os.path.abspath(path))
            hub_name = next((base for base in _texts(card.get("base_model")) if is_hub_name(base)), None)
        else:
            name, hub_name = display_name(path), path if is_hub_name(path) else None
        return cls(name, hub_name, next(iter(_texts(card.get("license"))), None), _texts(card.get("language")))


def is_hub_name(name: str) -> bool:
    """Return True if the text has the form of a hub name; a relative path may have it, too."""
    return _HUB_NAME.fullmatch(name) is not None and not name.startswith(".")


def display_name(path: str) -> str:
    """Return the last part of a path or URI; a hub name is returned unchanged."""
    if is_hub_name(path):
        return path
    path = redact(path)
    return last_part(path) or path


def _front_matter(card: str | None) -> dict[str, Any]:
    """Return the metadata of a card; empty without a card, or with one that is not valid."""
    import yaml

    try:
        text = Path(card).read_text(encoding="utf-8") if card else ""
        matter = re.match(r"\s*---\n(.*?)\n---(\n|$)", text.replace("\r\n", "\n"), re.DOTALL)
        value = yaml.safe_load(matter[1]) if matter else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _texts(value: Any) -> tuple[str, ...]:
    """Return the texts of a field that may be one text or a list."""
    values = value if isinstance(value, list) else [value]
    return tuple(each for each in values if isinstance(each, str) and each)
