"""What the person sees: plain lines, one progress bar a stage, a table at the end.

Ray, transformers and native libraries write to file descriptors 1 and 2 whenever they like. While a command runs, both
point to a log file, and only this module writes to the terminal.
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

from raybge.util.redaction import public


class Console:
    """The terminal of one command."""

    def __init__(self) -> None:
        self.log_path: str | None = None
        self.again = "resume=True"  # how a run that was stopped is continued
        self._out: Any = sys.stdout
        self._err: Any = sys.stderr

    def info(self, line: str) -> None:
        """Print one line, without what URIs hold to log in with."""
        print(public(line), file=self._out, flush=True)

    def error(self, message: str) -> None:
        print(public(message), file=self._err, flush=True)

    @contextmanager
    def bar(self, stage: str, total: int | None, unit: str) -> Iterator[tqdm[Any]]:
        """A progress bar with rate and time left; `.update(n)`, `.set_postfix_str(text)`."""
        shown = tqdm(
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
            yield shown
        finally:
            shown.close()

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print rows under their heads; the first column is left-aligned, the others right-aligned."""
        widths = [max(len(str(r[i])) for r in (head, *rows)) for i in range(len(head))]
        for row in (head, *rows):
            cells = [
                str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            self.info("  ".join(cells).rstrip())

    @contextmanager
    def capture(self, name: str, enabled: bool) -> Iterator[None]:
        """Send everything that others write to the terminal to a log file while the block runs."""
        if not enabled or self.log_path is not None:  # a command inside a command shares the outer one's log
            yield
            return
        stamp = time.strftime("%Y%m%d-%H%M%S")
        log, self.log_path = tempfile.mkstemp(prefix=f"raybge-{name}-{stamp}-", suffix=".log")
        sys.stdout.flush()
        sys.stderr.flush()
        terminal = self._out, self._err
        kept = os.dup(1), os.dup(2)
        self._out, self._err = (
            _terminal(s, fd, k) for s, fd, k in zip((sys.stdout, sys.stderr), (1, 2), kept, strict=True)
        )
        os.dup2(log, 1)
        os.dup2(log, 2)
        logging.captureWarnings(True)
        self.info(f"log: {self.log_path}")
        # Python's own streams too: in a notebook they are not the descriptors.
        with os.fdopen(log, "a", buffering=1) as stream, redirect_stdout(stream), redirect_stderr(stream):
            try:
                yield
            finally:
                logging.captureWarnings(False)
                for fd, saved in zip((1, 2), kept, strict=True):
                    os.dup2(saved, fd)
                    os.close(saved)
                self._out, self._err = terminal

    def log_traceback(self) -> None:
        """Write the exception being handled to the log (to the terminal when nothing is captured)."""
        print(public(traceback.format_exc()), file=sys.stderr, flush=True)


def _terminal(stream: Any, fd: int, kept: int) -> Any:
    """Where the person reads `stream`: itself in a notebook, else the terminal that `fd` was, now at `kept`."""
    try:
        is_descriptor = stream.fileno() == fd
    except (OSError, ValueError, AttributeError):
        is_descriptor = False
    return io.TextIOWrapper(os.fdopen(os.dup(kept), "wb"), line_buffering=True) if is_descriptor else stream
