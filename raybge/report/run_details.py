"""What was run: the part that the pages of all commands share. Secrets are left out of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from raybge.report.page import cell, command_block, facts, section, table
from raybge.util.redaction import SECRET, public, public_values
from raybge.util.versions import versions


@dataclass(frozen=True)
class Run:
    """A run of a command.

    Args:
        command: "train".
        flags: those that were given, by name; the names of secrets are passed over with their values.
        model: the model that it began with.
        data: name and rows of each file that was read, None where they were not counted.
        about: further facts by name.
        versions: of the libraries.
    """

    command: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    data: Sequence[tuple[str, int | None]] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def library_versions() -> dict[str, str]:
    """Of what encodes and searches."""
    import faiss

    return {**versions("ray", "torch", "transformers", "numpy", "pyarrow"), "faiss": faiss.__version__}


def heading(run: Run, title: str, said: Iterable[str], figures: Iterable[tuple[str, str]] = ()) -> str:
    """The top of the page: the command, what came of it, sentences about that and its main figures."""
    parts = [
        f'<p class="eyebrow">raybge.{escape(run.command)}</p>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(" · ".join(said))}</p>',
        facts(figures),
    ]
    return "\n".join(parts)


def what_was_run(run: Run) -> str:
    """The section that says how to do it again."""
    about = ([("model", public(run.model))] if run.model else []) + [(k, public(v)) for k, v in run.about.items()]
    rows = [
        f"<tr>{cell(public(name), 'text')}{cell('–' if count is None else f'{count:,}', 'number')}</tr>"
        for name, count in run.data
    ]
    return section(
        "What was run",
        "",
        command_block(command_of(run)),
        facts(about),
        table(["file", "rows"], rows, {"rows"}) if rows else "",
        facts(run.versions.items()),
    )


def command_of(run: Run) -> list[str]:
    """The words of the command line, without secrets."""
    words = ["python", "-m", f"raybge.{run.command}"]
    for name, value in run.flags.items():
        if SECRET.search(name) or value is None:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name}", *(public(_word(each)) for each in values)]
    return words


def _word(value: Any) -> str:
    return json.dumps(public_values(value), default=str) if isinstance(value, Mapping) else str(value)
