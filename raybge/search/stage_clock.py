"""Clock of a command's stages: duration of each stage and, without its start-up, its throughput."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from raybge.cli.console import Console
from raybge.util.plural import plural


class StageClock:
    """Measures stages by name: `with stages("encode"): ...`, then `stages.count("encode", 100, "text")`."""

    def __init__(self) -> None:
        """Start without stages."""
        self.seconds: dict[str, float] = {}
        self._amounts: dict[str, tuple[int, str]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the block as stage `name`, or add it to that stage."""
        start = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 3)

    def count(self, name: str, amount: int, unit: str) -> None:
        """Record how many items a stage processed; `unit` is the singular name of one."""
        self._amounts[name] = amount, unit

    def report(self, console: Console) -> None:
        """Print the table of stages, with the rates of their bars."""
        rows = []
        for name, seconds in self.seconds.items():
            amount, unit = self._amounts.get(name, (0, ""))
            rate = console.rates.get(name)
            text = "" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
            rows.append((name, plural(amount, unit) if unit else "", f"{seconds:,.1f}", text))
        console.table(("stage", "processed", "seconds", "per second"), rows)
