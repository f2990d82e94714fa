"""Evaluate retrieval: exact search in a corpus, then nDCG, MRR, Recall, MAP and more at 1, 10 and 100.

    python -m raybge.evaluate --encoder runs/mine --corpus_data corpus.jsonl --query_data dev.jsonl --k 100
    python -m raybge.evaluate --encoder runs/mine --corpus_data beir/scifact --query_data beir/scifact
    python -m raybge.evaluate --encoder runs/mine --mteb_tasks NFCorpus SciFact
    python -m raybge.evaluate --help

From Python: `raybge.evaluate_retrieval(model_name_or_path=..., corpus_data=..., query_data=...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import EvaluateOptions
from raybge.cli.run import call_command, run_command


def evaluate_retrieval(**flags: Any) -> dict[str, float]:
    """Evaluate retrieval.

    Args:
        **flags: the command's flags, by name.

    Returns:
        The metrics by name, such as "nDCG@10", and the numbers of queries and passages.

    Raises:
        UserError: flags, files or rows that cannot be used; before any model is loaded.
    """
    return call_command(EvaluateOptions, _evaluate, flags)


def _evaluate(options: EvaluateOptions, console: Console) -> dict[str, Any]:
    from raybge.evaluation.run import evaluate  # imported here, so that --help is fast

    return evaluate(options, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_command(EvaluateOptions, _evaluate, "evaluate", argv)


if __name__ == "__main__":
    raise SystemExit(main())
