"""Search training flags with Ray Tune; every trial is a `raybge.train` run, measured while it trains.

    python -m raybge.tune --model_name_or_path BAAI/bge-small-en-v1.5 --train_data groups.jsonl \\
        --output_dir runs/search --num_samples 12 --search "learning_rate=loguniform(1e-6,1e-4)"
    python -m raybge.tune --help

From Python: `raybge.tune_finetune(model_name_or_path=..., train_data=..., output_dir=..., search=[...])`.

The output folder gets `best/`, the best trial's model; `trials.csv` and `trials.json`; `report.html`. A search that was
killed goes on with --resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raybge.cli import run as cli
from raybge.cli.options import TuneOptions
from raybge.tuning.run import tune


def tune_finetune(**flags: Any) -> dict[str, Any]:
    """Search training flags; the arguments are the command's flags.

    Returns the best trial's `flags`, `metrics` and the `command` that trains it again.

    Raises UserError, before any model loads, for flags, files or rows that cannot be used.
    """
    return cli.call(TuneOptions, tune, "tune", flags)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(TuneOptions, tune, "tune", argv)


if __name__ == "__main__":
    raise SystemExit(main())
