"""`make soak` runs what is here; neither `make test` nor plain pytest does.

SOAK_INPUTS is how many inputs are tried in all.
"""

import hypothesis
import pytest
from inputs import TRIED

# Others in every run: what one finds is printed, and gets a test of its own in the ordinary suite.
hypothesis.settings.register_profile(
    "soak", derandomize=False, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("soak")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("inputs tried")
    for kind, count in sorted(TRIED.items()):
        terminalreporter.write_line(f"{count:>9,}  {kind}")
    terminalreporter.write_line(f"{sum(TRIED.values()):>9,}  in all")
