"""Check that a machine computes what raybge needs: gradients, half precision, packed texts, workers, search.

    python -m raybge.selftest
    python -m raybge.selftest --output_file selftest.json
    python -m raybge.selftest --help

Each check prints one line with its verdict. Models are small and random: no files, no hub, no Ray. On a machine with
GPUs all of them take part; without one the same runs on the CPU, and what needs a GPU is listed. The exit code is 1 if
a check fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import SelftestOptions
from raybge.cli.run import run_command


def _selftest(options: SelftestOptions, console: Console) -> dict[str, Any]:
    from raybge.diagnostics.run import selftest  # imported here, so that --help is fast

    return selftest(options, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(SelftestOptions, _selftest, "selftest", argv)


if __name__ == "__main__":
    raise SystemExit(main())
