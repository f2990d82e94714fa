"""Soak tests run by `make soak` only, not by `make test` or plain pytest.

SOAK_INPUTS is the total number of inputs.
"""

import pytest
from inputs import TRIED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TRIED:
        return
    terminalreporter.section("inputs tried")
    for kind, count in sorted(TRIED.items()):
        terminalreporter.write_line(f"{count:>9,}  {kind}")
    terminalreporter.write_line(f"{sum(TRIED.values()):>9,}  in total")
