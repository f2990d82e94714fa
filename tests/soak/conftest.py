"""`make soak` runs what is here; neither `make test` nor plain pytest does.

SOAK_INPUTS is how many inputs are tried in all.
"""

import pytest
from inputs import TRIED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TRIED:
        return
    terminalreporter.section("inputs tried")
    for kind, count in sorted(TRIED.items()):
        terminalreporter.write_line(f"{count:>9,}  {kind}")
    terminalreporter.write_line(f"{sum(TRIED.values()):>9,}  in all")
