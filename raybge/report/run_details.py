"""Details of a command's run that its page and its metadata file show: command line, data, versions. No secrets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raybge.report.text import shorten
from raybge.util.filesystem import last_part
from raybge.util.redaction import SECRET_FLAG, redact, redact_settings
from raybge.util.versions import versions

MAX_NAME = 48  # characters of a name in the head
_OUTPUTS = ("output_dir", "output_file", "output_path", "metrics_file")  # flags of the output that a page belongs to


@dataclass(frozen=True)
class PageHead:
    """Head of a page: its title, and which run it shows.

    Args:
        title: Title, the main result.
        command: Name of the command, such as "train".
        run: Name of the output.
        model: Name of the model.
        data: Names of the data.
    """

    title: str
    command: str
    run: str = ""
    model: str = ""
    data: str = ""

    @property
    def subject(self) -> list[tuple[str, str]]:
        """Names and values that identify the run."""
        pairs = [("run", self.run), ("model", self.model), ("data", self.data)]
        return [(name, value) for name, value in pairs if value]

    @property
    def document_title(self) -> str:
        """Title of the document, as a browser's tab shows it."""
        return " · ".join([self.title, *(value for _, value in self.subject), f"raybge.{self.command}"])

    @property
    def summary(self) -> str:
        """The head as JSON, for the overview of several runs."""
        return json.dumps(asdict(self), ensure_ascii=False)


def short_names(paths: Sequence[str]) -> str:
    """Return the last parts of paths, at most two of them."""
    names = list(dict.fromkeys(shorten(last_part(redact(path)), MAX_NAME) for path in paths))
    more = f" and {len(names) - 2:,} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


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

    def head(self, title: str) -> PageHead:
        """Return the head of the run's page."""
        outputs = [str(self.flags[name]) for name in _OUTPUTS if self.flags.get(name)]
        model = redact(self.model)
        is_path = model.count("/") > 1 or model.startswith(("/", ".", "~"))
        return PageHead(
            title,
            self.command,
            run=short_names(outputs[:1]),
            model=shorten(last_part(model) if is_path else model, MAX_NAME),
            data=short_names([name for name, _ in self.data]),
        )

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
