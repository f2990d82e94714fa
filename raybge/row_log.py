"""Check which rows each step of a run with --log_rows trained: each row once an epoch, over all attempts and workers.

    python -m raybge.row_log runs/mine

From Python: `raybge.row_log.epochs("runs/mine")`.
"""

from __future__ import annotations

import sys

from raybge.training.row_records import epochs, main

__all__ = ["epochs", "main"]

if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
