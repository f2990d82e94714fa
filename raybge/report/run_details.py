"""Details of a command's run that its page and its metadata file show: command line, data, versions. No secrets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raybge.util.redaction import SECRET_FLAG, redact, redact_settings
from raybge.util.versions import versions


@dataclass(frozen=True)
class RunDetails:
    """Details of one run. Its properties contain no secrets and are what pages show.

    Args:
        command: Name of the command, such as "train".
        flags: The flags that were set, by name.
        model: The model that the run started from.
        data: Name and number of rows of each input file; None if the rows were not counted.
        more: Further facts by name.
        versions: Versions of libraries by name.
    """

    command: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    data: Sequence[tuple[str, int | None]] = ()
    more: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def command_line(self) -> list[str]:
        """Words of the command line; secret flags are omitted, credentials in paths replaced."""
        words = ["python", "-m", f"raybge.{self.command}"]
        for name, value in self.flags.items():
            if SECRET_FLAG.search(name) or value is None:
                continue
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name}", *(redact(_word(each)) for each in values)]
        return words

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The model and the further facts as (name, value)."""
        model = [("model", redact(self.model))] if self.model else []
        return model + [(name, redact(value)) for name, value in self.more.items()]

    @property
    def files(self) -> list[tuple[str, str]]:
        """Name and number of rows of each input file."""
        return [(redact(name), "–" if count is None else f"{count:,}") for name, count in self.data]


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that encoding and search depend on."""
    import faiss

    return {**versions("ray", "torch", "transformers", "numpy", "pyarrow"), "faiss": faiss.__version__}


def _word(value: Any) -> str:
    return json.dumps(redact_settings(value), default=str) if isinstance(value, Mapping) else str(value)
