r"""Search training flags with Ray Tune; every trial is a `raybge.train` run that is evaluated while it trains.

    python -m raybge.tune --model_name_or_path BAAI/bge-small-en-v1.5 --train_data groups.jsonl \
        --output_dir runs/search --num_samples 12 --search "learning_rate=loguniform(1e-6,1e-4)"
    python -m raybge.tune --help

From Python: `raybge.tune_finetune(model_name_or_path=..., train_data=..., output_dir=..., search=[...])`.

The output folder gets `best/` (the best trial's model), `trials.csv`, `trials.json` and `report.html`. `--resume`
continues a search that was killed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from raybge.cli.console import Console
from raybge.cli.options import TuneOptions
from raybge.cli.run import call_command, run_command
from raybge.cli.signatures import with_keywords

if TYPE_CHECKING:
    from raybge.cli.options.training_keywords import TuneKeywords
    from raybge.tuning.tuning_results import TuningResult


@with_keywords(TuneOptions)
def tune_finetune(**flags: Unpack[TuneKeywords]) -> TuningResult:
    """Search training flags.

    Args:
        **flags: the command's flags, listed below.

    Returns:
        The best trial's model, flags and metrics, and the command that trains it again.

    Raises:
        UserError: a flag, a file or a row is invalid; raised before any model loads.
    """
    return call_command(TuneOptions, _tune, flags)


def _tune(options: TuneOptions, console: Console) -> TuningResult:
    from raybge.tuning.run import tune  # imported here, so that --help is fast

    return tune(options, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(TuneOptions, _tune, "tune", argv)


if __name__ == "__main__":
    raise SystemExit(main())
