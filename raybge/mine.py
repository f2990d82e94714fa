r"""Mine hard negatives: passages that the model ranks high for a query although they do not answer it.

    python -m raybge.mine --model_name_or_path BAAI/bge-small-en-v1.5 --input_file groups.jsonl \
        --output_file groups_mined.jsonl --range_for_sampling 2-200 --negative_number 15
    python -m raybge.mine --score_only --cross_encoder BAAI/bge-reranker-base --input_file groups.jsonl \
        --output_file groups_scored.jsonl
    python -m raybge.mine --help

From Python: `raybge.mine_hard_negatives(model_name_or_path=..., input_file=..., output_file=...)`.

Finished work is kept next to the output, or under `--storage_path`: an interrupted run continues from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from raybge.cli.console import Console
from raybge.cli.options import MineOptions
from raybge.cli.run import call_command, run_command
from raybge.cli.signatures import with_keywords

if TYPE_CHECKING:
    from raybge.cli.options.searching_keywords import MineKeywords
    from raybge.mining.results import MiningResult


@with_keywords(MineOptions)
def mine_hard_negatives(**flags: Unpack[MineKeywords]) -> MiningResult:
    """Mine hard negatives.

    Args:
        **flags: the command's flags, listed below.

    Returns:
        The output file and its report, counts, and seconds of each stage.

    Raises:
        UserError: flags, files or rows that cannot be used; before any model is loaded.
    """
    return call_command(MineOptions, _mine, flags)


def _mine(options: MineOptions, console: Console) -> MiningResult:
    from raybge.mining.run import mine  # imported here, so that --help is fast

    return mine(options, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_command(MineOptions, _mine, "mine", argv)


if __name__ == "__main__":
    raise SystemExit(main())
