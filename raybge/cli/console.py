"""Output on the terminal: plain lines, one progress bar per stage, a table at the end.

Ray, transformers and native libraries write to file descriptors 1 and 2 at any time. While a command runs, both point
to a log file, and only this module writes to the terminal.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from tqdm import tqdm

from raybge.util.redaction import redact


class Console:
    """The terminal of one command.

    Args:
        shows_messages: messages of Ray and tracebacks of restarts are written to sys.stderr. `capture` sets it: they go
            to its log file.
        keeps_ray: a Ray that is started for this call stays for the next one; for the Python functions.
    """

    def __init__(self, shows_messages: bool = False, keeps_ray: bool = False) -> None:
        self.log_path: str | None = None
        self.shows_messages = shows_messages
        self.keeps_ray = keeps_ray
        self.resume_command = "resume=True"  # shown when a run stops early; commands set their command line
        self._out: Any = sys.stdout
        self._err: Any = sys.stderr

    def info(self, line: str) -> None:
        """Print one line; credentials in URIs are redacted."""
        print(redact(line), file=self._out, flush=True)

    def error(self, message: str) -> None:
        """Print a message to stderr; credentials in URIs are redacted."""
        print(redact(message), file=self._err, flush=True)

    @contextmanager
    def bar(self, stage: str, total: int | None, unit: str) -> Iterator[tqdm[Any]]:
        """Show a progress bar with rate and remaining time while the block runs.

        Args:
            stage: label in front of the bar.
            total: number of units; None if unknown.
            unit: name of what is counted.

        Yields:
            The tqdm bar, with `.update(n)` and `.set_postfix_str(text)`.
        """
        progress = tqdm(
            total=total,
            desc=stage,
            unit=f" {unit}",
            file=self._err,
            dynamic_ncols=True,
            mininterval=0.2 if self._err.isatty() else 10.0,
            smoothing=0.1,
            bar_format="{desc:<10} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt}{unit} "
            "[{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )
        try:
            yield progress
        finally:
            progress.close()

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; the first column is left-aligned, the others right-aligned."""
        widths = [max(len(str(r[i])) for r in (head, *rows)) for i in range(len(head))]
        for row in (head, *rows):
            cells = [
                str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            self.info("  ".join(cells).rstrip())

    @contextmanager
    def capture(self, name: str, enabled: bool) -> Iterator[None]:
        """Redirect everything but this console's output to a log file while the block runs.

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
        self.info(f"log: {self.log_path}")
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

    def log_traceback(self) -> None:
        """Write the current exception to the log, or to the terminal if output is not redirected."""
        print(redact(traceback.format_exc()), file=sys.stderr, flush=True)


def _terminal(stream: Any, fd: int, copy: int) -> Any:
    """Return a stream to the terminal: `stream` itself in a notebook, else one on `copy`, the duplicate of `fd`."""
    try:
        is_descriptor = stream.fileno() == fd
    except (OSError, ValueError, AttributeError):
        is_descriptor = False
    return io.TextIOWrapper(os.fdopen(os.dup(copy), "wb"), line_buffering=True) if is_descriptor else stream
