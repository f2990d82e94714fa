"""Measure retrieval: exact search over a corpus, then nDCG, MRR, Recall and MAP at 1, 10 and 100.

    python -m raybge.evaluate --encoder runs/mine --corpus_data corpus.jsonl --query_data dev.jsonl --k 100
    python -m raybge.evaluate --help

From Python: `raybge.evaluate_retrieval(model_name_or_path=..., corpus_data=..., query_data=...)`.

Letters in array names: Q queries, K ranks, N relevant passages of all queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raybge.cli.run import call_command, run_command
from raybge.cli.options import EvaluateOptions
from raybge.evaluation.run import evaluate


def evaluate_retrieval(**flags: Any) -> dict[str, float]:
    """Measure retrieval; the arguments are the command's flags. Returns the metrics by name, e.g. "nDCG@10".

    Raises UserError, before any model loads, for flags, files or rows that cannot be used.
    """
    return call_command(EvaluateOptions, evaluate, "evaluate", flags)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(EvaluateOptions, evaluate, "evaluate", argv)


if __name__ == "__main__":
    raise SystemExit(main())
