"""Check which rows each step of a run trained: each row once an epoch, over all starts and workers.

python -m raybge.row_log runs/mine
"""

import sys

from raybge.training.row_records import epochs, main

__all__ = ["epochs", "main"]

if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
