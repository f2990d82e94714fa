"""Check which rows each step of a run with --log_rows trained: each row once an epoch, over all attempts and workers.

    python -m raybge.row_log runs/mine

From Python: `raybge.row_log.epochs("runs/mine")`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from raybge.cli.console import Console
from raybge.training import row_records
from raybge.training.row_records import epochs
from raybge.util.errors import UserError

__all__ = ["epochs", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each epoch; return the exit code, 1 if the rows of an epoch are not exact."""
    parser = argparse.ArgumentParser(prog="python -m raybge.row_log", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output_dir", help="output folder of a run with --log_rows")
    output = parser.parse_args(argv).output_dir
    try:
        return row_records.main(output)
    except UserError as error:
        Console().error(f"raybge.row_log: {error}")
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
