"""Render a report as one self-contained HTML file: it needs no network, no other file and no script to be read.

A page consists of a Python module that prepares its texts and charts and, next to it, a Jinja template that arranges
them with the macros of `templates/kit.html.jinja`. Autoescape is on; only charts (`Markup`) enter unescaped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from markupsafe import Markup

from raybge.report.run_details import PageHead
from raybge.report.text import excerpt, format_duration, format_flag, format_metric, format_value, shell_command
from raybge.util.atomic_write import open_atomic
from raybge.util.errors import log_errors

if TYPE_CHECKING:
    from jinja2 import Environment

Report = TypeVar("Report")

REPORT = "report.html"  # name of the page in an output folder; ending of the page next to an output file
HEAD_NAME = "raybge-run"  # of the element with the page's head as JSON


def render(template: str, head: PageHead, **values: Any) -> str:
    """Render a page.

    Args:
        template: Path of the template relative to the package, such as "mining/page.html.jinja".
        head: Title and subject of the page.
        **values: Variables of the template.

    Returns:
        The HTML document.
    """
    package = files("raybge.report")
    style, script = ((package / name).read_text(encoding="utf-8").strip() for name in ("page.css", "page.js"))
    values |= {"head": head, "head_name": HEAD_NAME, "style": Markup(style), "script": Markup(script)}
    return _environment().get_template(template).render(values)


def write_page(path: str, html: str, flag: str) -> None:
    """Write a page to a path or URI; it appears under its name only when complete.

    Args:
        path: Where to write.
        html: The document.
        flag: The flag that determined the path, for error messages.

    Raises:
        UserError: If the path cannot be written.
    """
    data = html.encode()
    with open_atomic(path, flag) as out:
        out.write(data)


def write_or_log(write: Callable[[str, Report], None], path: str, build: Callable[[], Report]) -> bool:
    """Write the report of a finished run. A failure is logged and ends there: the run's results are complete.

    Args:
        write: Writes a report to a path.
        path: Where to write it.
        build: Builds the report.

    Returns:
        True if the report was written.
    """
    written = False
    with log_errors():
        write(path, build())
        written = True
    return written


def breakable(text: str) -> Markup:
    """Allow line breaks after underscores of long names, at least ten characters apart."""
    ends = [match.end() for match in re.finditer(r"\S{9,}?_", text)]
    return Markup("<wbr>").join(text[start:end] for start, end in pairwise([0, *ends, len(text)]))


@cache
def _environment() -> Environment:
    # Imported here: workers import page modules, but only one of them renders a page.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("raybge", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": breakable,
        "duration": format_duration,
        "excerpt": excerpt,
        "flag": format_flag,
        "metric": format_metric,
        "shell": shell_command,
        "value": format_value,
    }
    return environment
