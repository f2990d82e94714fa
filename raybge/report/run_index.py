"""Index page of the runs in a folder, from the heads of their report pages."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from raybge.report.page import HEAD_NAME, REPORT, render, write_page
from raybge.report.run_details import PageHead
from raybge.util.errors import UserError
from raybge.util.plural import plural

INDEX = "index.html"
_HEAD_BYTES = 16 << 10  # of a page, which hold its head
_META = re.compile(rf'<meta name="{HEAD_NAME}" content="([^"]*)">')


@dataclass(frozen=True)
class IndexedRun:
    """One run of the index.

    Args:
        head: Head of its page.
        place: Folder of the page, or the file it is next to, relative to the index.
        link: URL of the page, relative to the index.
        written: Time when the page was written.
    """

    head: PageHead
    place: str
    link: str
    written: datetime


def write_index(folder: str) -> str:
    """Write INDEX into a folder, with a row for each report page in it, at any depth.

    Args:
        folder: The folder with the outputs of runs.

    Returns:
        The path of the page.

    Raises:
        UserError: If the folder does not exist or has no report page, or if the page cannot be written.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    runs = sorted(_runs(Path(folder)), key=lambda run: (run.written, run.place), reverse=True)
    if not runs:
        raise UserError(f"{folder}: no {REPORT} of a run is in this folder or below it")
    path = os.path.join(folder, INDEX)
    head = _head(Path(path)) if os.path.exists(path) else None
    if os.path.exists(path) and (head is None or head.command != "runs"):
        raise UserError(f"{path} is another page: move it away, or choose another folder")
    write_page(path, index_html(os.path.basename(os.path.abspath(folder)), runs), "FOLDER")
    return path


def index_html(name: str, runs: list[IndexedRun]) -> str:
    """Render the page.

    Args:
        name: Name of the folder.
        runs: The runs, in the order of the page.

    Returns:
        The document.
    """
    commands = dict.fromkeys(run.head.command for run in runs)
    return render(
        "report/templates/run_index.html.jinja",
        PageHead(f"{plural(len(runs), 'run')} in {name}", "runs"),
        groups=[(command, [run for run in runs if run.head.command == command]) for command in commands],
    )


def _runs(top: Path) -> Iterator[IndexedRun]:
    """Yield the runs whose pages are below `top`; hidden folders and checkpoints are skipped."""
    for folder, subfolders, names in os.walk(top):
        subfolders[:] = sorted(each for each in subfolders if not each.startswith((".", "checkpoint-")))
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(REPORT) and (head := _head(path)):
                inside = path.relative_to(top).as_posix()
                place = inside.removesuffix(REPORT).rstrip("./") or top.resolve().name
                yield IndexedRun(head, place, quote(inside), datetime.fromtimestamp(path.stat().st_mtime))


def _head(path: Path) -> PageHead | None:
    """Read the head of a report page; None if the file is not one."""
    try:
        with path.open("rb") as file:
            match = _META.search(file.read(_HEAD_BYTES).decode("utf-8", "replace"))
        values = json.loads(html.unescape(match[1])) if match else None
    except (OSError, ValueError):
        return None
    names = [field.name for field in fields(PageHead)]
    if not isinstance(values, dict) or not all(isinstance(values.get(name), str) for name in names):
        return None
    return PageHead(**{name: values[name] for name in names})
