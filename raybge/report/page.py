"""A report as one HTML file that needs nothing else: no network, no other file, and no script to be read."""

from __future__ import annotations

import re
import shlex
import traceback
from collections.abc import Callable, Container, Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import TypeVar

About = TypeVar("About")

# A browser then refuses whatever is not in the file, should anything ever get in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(title: str, *sections: str) -> str:
    """The whole document; `sections` are HTML."""
    here = files("raybge.report")
    style, script = ((here / name).read_text(encoding="utf-8").strip() for name in ("page.css", "page.js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}
</style>
</head>
<body>
<main>
{"".join(sections)}
</main>
<script>
{script}
</script>
</body>
</html>
"""


def written(write: Callable[[str, About], None], path: str, about: Callable[[], About]) -> bool:
    """Write a report of a run that is over. One that fails is said in the log: what it tells of is there and whole."""
    try:
        write(path, about())
    except Exception:
        traceback.print_exc()
        return False
    return True


def section(heading: str, note: str, *content: str) -> str:
    """A part of the page under its heading, `note` being a sentence of text; nothing at all without content."""
    inside = "".join(content)
    if not inside:
        return ""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section>\n<h2>{escape(heading)}</h2>\n{note}\n{inside}\n</section>\n"


def chart(wide: str, narrow: str = "") -> str:
    """A drawing; where there is a narrow one, small screens show that instead, so that its texts stay legible."""
    if not wide:
        return ""
    if not narrow:
        return f'<div class="chart">{wide}</div>'
    return f'<div class="chart wide">{wide}</div><div class="chart narrow">{narrow}</div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values side by side."""
    inside = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{inside}</dl>' if inside else ""


def shell(command: Sequence[str]) -> str:
    """The words of a command as a POSIX shell takes them: one flag a line, and one value a line where they are long."""
    lines: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    joined = (" ".join(line) if sum(map(len, line)) < 100 else " \\\n        ".join(line) for line in lines if line)
    return " \\\n    ".join(joined)


def command_block(command: Sequence[str]) -> str:
    """A command to be copied."""
    return f'<pre class="command" tabindex="0"><code>{escape(shell(command))}</code></pre>'


def table(heads: Sequence[str], rows: Iterable[str], numbers: Container[str] = ()) -> str:
    """A table that scrolls by itself where it is too wide; `rows` are HTML, `numbers` the heads of aligned columns."""
    right = (' class="number"' if name in numbers else "" for name in heads)
    head = "".join(f'<th scope="col"{r}>{breakable(name)}</th>' for name, r in zip(heads, right, strict=True))
    body = "\n".join(rows)
    inside = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{inside}</table></div>'


def cell(text: str, class_: str = "") -> str:
    """One cell of text."""
    about = f' class="{escape(class_)}"' if class_ else ""
    return f"<td{about}>{breakable(text)}</td>"


def breakable(text: str) -> str:
    """Text whose long names may be broken after an underscore, into parts of ten characters or more."""
    return re.sub(r"(\S{9,}?_)", r"\1<wbr>", escape(text))


def duration(seconds: float) -> str:
    """A time as people say it: 12.5 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60:,} h"


TEXT = 320  # characters of a text that are shown


def cut(text: str) -> str:
    """The beginning of a text, on one line."""
    plain = " ".join(text[: 4 * TEXT].split())
    return plain if len(plain) <= TEXT else plain[: TEXT - 1] + "…"
