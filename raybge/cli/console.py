"""Output on the terminal: plain lines, one progress bar at a time, tables.

Ray, transformers and native libraries write to file descriptors 1 and 2 at any time. While a command runs, both point
to a log file, and only this module writes to the terminal.

A terminal shows the current stage in its last line, which is redrawn and finally erased. Without one, in files and
notebooks, the stage is a line from time to time.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from raybge.cli.progress_bar import ProgressBar
from raybge.cli.terminal import BOLD, CYAN, DIM, GREEN, RED, columns, is_terminal, styled, wrapped
from raybge.util.redaction import redact
from raybge.util.text_format import shorten

DRAW_SECONDS = 0.1  # between two drawings of a bar on a terminal
TICK_SECONDS = 0.5  # a bar is drawn so often without any change
QUIET_SECONDS = 2.0  # without a terminal, what lasts less has no line
LINE_SECONDS = 10.0, 300.0  # without a terminal, between two lines of a bar: at first, at most
CELL_STYLES = {"better": GREEN, "worse": RED}
WIDE_COLUMNS = 120  # taken as the width where there is no terminal
MIN_CELL = 16  # characters of the first column of a table that is too wide


class Console:
    """The terminal of one command.

    Args:
        shows_messages: messages of Ray and tracebacks of restarts are written to sys.stderr. `capture` sets it: they go
            to its log file.
        keeps_ray: a Ray that is started for this call stays for the next one; for the Python functions.
        verbose: show the lines of `detail`, too.

    Attributes:
        rates: units per second of each finished bar by its stage, without start-up; None if unknown.
    """

    def __init__(self, shows_messages: bool = False, keeps_ray: bool = False, verbose: bool = False) -> None:
        self.log_path: str | None = None
        self.shows_messages = shows_messages
        self.keeps_ray = keeps_ray
        self.verbose = verbose
        self.resume_command = "resume=True"  # shown when a run stops early; commands set their command line
        self.rates: dict[str, float | None] = {}
        self._out: Any = sys.stdout
        self._err: Any = sys.stderr
        self._lock = threading.RLock()
        self._bars: list[ProgressBar] = []  # the last one is shown
        self._shown = ""  # line of a bar on the terminal
        self._announced = True  # the log file's path

    @property
    def columns(self) -> int:
        """Width of the terminal."""
        return columns(self._out) if is_terminal(self._out) else WIDE_COLUMNS

    # --- lines ---

    def info(self, line: str, style: str = "") -> None:
        """Print one line; credentials in URIs are redacted. `style` is one of `terminal`, such as BOLD."""
        self._announce_log()
        self._print(self._out, redact(line), style)

    def message(self, line: str) -> None:
        """Print a line about the progress to stderr; credentials in URIs are redacted."""
        self._print(self._err, redact(line))

    def error(self, message: str) -> None:
        """Print a message about a failure to stderr; credentials in URIs are redacted."""
        self._print(self._err, redact(message), RED)

    def detail(self, line: str) -> None:
        """Print a line with --verbose; otherwise write it to the log file."""
        if self.verbose:
            self.info(line)
        elif self.log_path is not None:
            print(redact(line), flush=True)  # redirected

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; the first column is left-aligned, the others right-aligned.

        On a terminal that is too narrow the first column is shortened.
        """
        widths = [max(len(str(r[i])) for r in (head, *rows)) for i in range(len(head))]
        if is_terminal(self._out):
            room = columns(self._out) - sum(widths[1:]) - 2 * len(widths[1:])
            widths[0] = min(widths[0], max(room, MIN_CELL))
        for number, row in enumerate((head, *rows)):
            first, *others = map(str, row)
            cells = [shorten(first, widths[0]).ljust(widths[0])]
            cells += [
                styled(cell.rjust(width), CELL_STYLES.get(cell, ""), self._out)
                for cell, width in zip(others, widths[1:], strict=True)
            ]
            self._announce_log()
            self._print(self._out, redact("  ".join(cells).rstrip()), BOLD if not number else "", wraps=False)

    def _print(self, stream: Any, text: str, style: str = "", wraps: bool = True) -> None:
        """Print above the bar."""
        with self._lock:
            self._erase()
            if wraps and is_terminal(stream):
                text = wrapped(text, columns(stream))
            print(styled(text, style, stream), file=stream, flush=True)
            if self._bars and is_terminal(self._err):
                self._draw()

    # --- progress ---

    @contextmanager
    def bar(self, stage: str, total: int | None, unit: str, start_up: str = "") -> Iterator[ProgressBar]:
        """Show a progress bar with rate and remaining time while the block runs.

        If the block raises an error, the last state stays on the terminal.

        Args:
            stage: label in front of the bar.
            total: number of units; None if unknown.
            unit: singular name of what is counted.
            start_up: description of the time until the first unit is begun, which does not count for the rate.

        Yields:
            The bar.
        """
        bar = ProgressBar(stage, self._on_change, total, unit, start_up)
        if not start_up:
            bar.begin()
        try:
            with self._showing(bar):
                yield bar
        except BaseException:
            if bar.n:
                self.message(bar.line())
            raise
        self.rates[stage] = bar.rate

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens while the block runs, if nothing is counted."""
        with self._showing(ProgressBar(name, self._on_change)):
            yield

    @contextmanager
    def _showing(self, bar: ProgressBar) -> Iterator[None]:
        """Show a bar in place of that of an outer block, and redraw it from a thread: the block may wait for long."""
        self._announce_log()
        with self._lock:
            self._bars.append(bar)
        ended = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(bar, ended), name="progress", daemon=True)
        ticker.start()
        try:
            self._on_change()
            yield
        finally:
            ended.set()
            with self._lock:
                self._bars.remove(bar)
                self._erase()
            ticker.join()

    def _tick(self, bar: ProgressBar, ended: threading.Event) -> None:
        while not ended.wait(TICK_SECONDS):
            with self._lock:
                if self._bars and self._bars[-1] is bar:
                    self._on_change()

    def _on_change(self) -> None:
        """Draw the current bar if its last drawing is old enough."""
        with self._lock:
            if not self._bars:
                return
            bar, now = self._bars[-1], time.monotonic()
            if is_terminal(self._err):
                if now - bar.drawn_at >= DRAW_SECONDS:
                    self._draw()
                return
            elapsed = now - bar.start
            pause = min(max(LINE_SECONDS[0], elapsed / 20), LINE_SECONDS[1])
            if elapsed >= QUIET_SECONDS and now - bar.drawn_at >= pause:
                bar.drawn_at = now
                print(bar.line(), file=self._err, flush=True)

    def _draw(self) -> None:
        """Write the bar into the terminal's last line."""
        unicode = (getattr(self._err, "encoding", "") or "").lower().startswith("utf")
        blocks = "━─" if unicode else "#-"
        line = self._bars[-1].line(columns(self._err) - 1, blocks)
        if has_bar := line.count(blocks[0]):
            line = line.replace(blocks[0] * has_bar, styled(blocks[0] * has_bar, CYAN, self._err), 1)
        self._bars[-1].drawn_at = time.monotonic()
        if line != self._shown:
            self._shown = line
            print(f"\r{line}\x1b[K", end="", file=self._err, flush=True)

    def _erase(self) -> None:
        """Remove the bar from the terminal."""
        if self._shown:
            self._shown = ""
            print("\r\x1b[K", end="", file=self._err, flush=True)

    # --- log file ---

    @contextmanager
    def capture(self, name: str, enabled: bool) -> Iterator[None]:
        """Redirect everything but this console's output to a log file while the block runs.

        The path of the file is printed before the first line of the block. An empty file is removed at the end.

        Args:
            name: command name in the log file's name.
            enabled: False leaves all output on the terminal.
        """
        self.shows_messages = True
        if not enabled or self.log_path is not None:  # a nested command shares the log of the outer one
            yield
            return
        stamp = time.strftime("%Y%m%d-%H%M%S")
        log, self.log_path = tempfile.mkstemp(prefix=f"raybge-{name}-{stamp}-", suffix=".log")
        self._announced = False
        sys.stdout.flush()
        sys.stderr.flush()
        terminal = self._out, self._err
        copies = os.dup(1), os.dup(2)
        self._out, self._err = (
            _terminal(s, fd, copy) for s, fd, copy in zip((sys.stdout, sys.stderr), (1, 2), copies, strict=True)
        )
        os.dup2(log, 1)
        os.dup2(log, 2)
        logging.captureWarnings(True)
        # Python's streams as well: in a notebook they do not write to the descriptors.
        with os.fdopen(log, "a", buffering=1) as stream, redirect_stdout(stream), redirect_stderr(stream):
            try:
                yield
            finally:
                logging.captureWarnings(False)
                for fd, saved in zip((1, 2), copies, strict=True):
                    os.dup2(saved, fd)
                    os.close(saved)
                self._out, self._err = terminal
                stream.flush()
                if not os.path.getsize(self.log_path):
                    os.unlink(self.log_path)

    def _announce_log(self) -> None:
        """Print the path of the log file once: a command that ends at once with an error has no use for it."""
        if not self._announced:
            self._announced = True
            self._print(self._out, f"log: {self.log_path}", DIM, wraps=False)

    def log_traceback(self) -> None:
        """Write the current exception to the log, or to the terminal if output is not redirected."""
        print(redact(traceback.format_exc()), file=sys.stderr, flush=True)


def _terminal(stream: Any, fd: int, copy: int) -> Any:
    """Return a stream to the terminal: `stream` itself in a notebook, else one on `copy`, the duplicate of `fd`."""
    try:
        is_descriptor = stream.fileno() == fd
    except (OSError, ValueError, AttributeError):
        is_descriptor = False
    if not is_descriptor:
        return stream
    return io.TextIOWrapper(os.fdopen(os.dup(copy), "wb"), errors="replace", line_buffering=True)
