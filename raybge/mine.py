"""Mine hard negatives: passages that the model ranks high for a query and that are not its answers.

    python -m raybge.mine --model_name_or_path BAAI/bge-small-en-v1.5 --input_file groups.jsonl \\
        --output_file groups_mined.jsonl --range_for_sampling 2-200 --negative_number 15
    python -m raybge.mine --score_only --cross_encoder BAAI/bge-reranker-base --input_file groups.jsonl \\
        --output_file groups_scored.jsonl
    python -m raybge.mine --help

From Python: `raybge.mine_hard_negatives(model_name_or_path=..., input_file=..., output_file=...)`.

What is done is kept beside the output, or under `--storage_path`: a run that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raybge.cli import run as cli
from raybge.cli.options import MineOptions
from raybge.mining.run import mine


def mine_hard_negatives(**flags: Any) -> dict[str, Any]:
    """Mine hard negatives; the arguments are the command's flags. Returns the summary.

    Raises UserError, before any model loads, for flags, files or rows that cannot be used.
    """
    return cli.call(MineOptions, mine, "mine", flags)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(MineOptions, mine, "mine", argv)


if __name__ == "__main__":
    raise SystemExit(main())
