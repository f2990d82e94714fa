"""A console on a pseudo-terminal that pyte renders, or on a file; its clock moves only when a test moves it."""

import fcntl
import os
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyte
import pytest

from raybge.cli import console as console_module
from raybge.cli import progress_bar
from raybge.cli.console import Console

LINES = 60  # more than any screen of a test: nothing scrolls


class Clock:
    """Time of the console."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class Screen:
    """What a person sees. `snapshot` keeps the present state under a heading; `text` is all of them.

    Args:
        columns: width of the terminal; 0 for a file.
    """

    def __init__(self, columns: int) -> None:
        self.columns, self.snapshots, self.written = columns, [], b""
        self._master, slave = os.openpty() if columns else os.pipe()
        if columns:
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding="utf-8", buffering=1)
        self._screen = pyte.Screen(columns or 240, LINES)
        self._screen.set_mode(pyte.modes.LNM)  # in a file a line feed ends the line
        self._parser = pyte.ByteStream(self._screen)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 4096)
            except OSError:  # Linux: the other side of the pseudo-terminal is closed
                return
            if not data:
                return
            self._parser.feed(data)
            self.written += data

    def snapshot(self, heading: str) -> None:
        """Keep what is on the screen now."""
        mark = f"snapshot {len(self.snapshots)}"
        print(f"\x1b]2;{mark}\x07", end="", file=self.stream, flush=True)  # title of the window: nothing to see
        end = time.monotonic() + 10
        while self._screen.title != mark:
            assert time.monotonic() < end, "the terminal does not read"
            time.sleep(0.001)
        lines = [line.rstrip() for line in self._screen.display]
        while lines and not lines[-1]:
            lines.pop()
        self.snapshots.append((heading, lines))

    @property
    def text(self) -> str:
        """All snapshots: of later ones only the lines that differ from the one before."""
        parts, before = [], []
        for heading, lines in self.snapshots:
            same = next((i for i, pair in enumerate(zip(lines, before, strict=False)) if pair[0] != pair[1]), None)
            same = min(len(lines), len(before)) if same is None else same
            parts.append("\n".join([f"--- {heading}", *lines[same:]]))
            before = lines
        return "\n".join(parts) + "\n"

    def close(self) -> None:
        """Close both sides."""
        self.stream.close()
        self._reader.join()
        os.close(self._master)


@contextmanager
def console_on(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Console, Screen, Clock]]:
    """Provide a console on a terminal of this width, or on a file with 0 columns."""
    clock, screen = Clock(), Screen(columns)
    with monkeypatch.context() as patch:
        patch.setattr(progress_bar, "monotonic", clock)
        patch.setattr(console_module, "time", SimpleNamespace(monotonic=clock, strftime=time.strftime))
        patch.setattr(console_module, "TICK_SECONDS", 1000.0)
        patch.delenv("NO_COLOR", raising=False)
        patch.setenv("TERM", "xterm-256color")
        patch.setattr("sys.stdout", screen.stream)
        patch.setattr("sys.stderr", screen.stream)
        console = Console()
        try:
            yield console, screen, clock
        finally:
            screen.close()


Scenario = Callable[[Console, Screen, Clock], Any]


def write_model(folder):
    """Write a few files of a model, next to one that is not published."""
    for name in ("README.md", "config.json", "model.safetensors", "report.html"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, name).write_text("{}")
