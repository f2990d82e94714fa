"""Write an index page of the runs in a folder: index.html, with the result of each run and a link to its report.

    python -m raybge.runs runs

From Python: `raybge.runs.write_index("runs")`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from raybge.cli.console import Console
from raybge.report.run_index import write_index
from raybge.util.errors import UserError

__all__ = ["main", "write_index"]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and print its path; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m raybge.runs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", help="folder with the outputs of runs, at any depth")
    folder = parser.parse_args(argv).folder
    try:
        print(write_index(folder))
    except UserError as error:
        Console().error(f"raybge.runs: {error}")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
