"""Evaluate retrieval: exact search in a corpus, then nDCG, MRR, Recall, MAP and more at 1, 10 and 100.

    python -m raybge.evaluate --encoder runs/mine --corpus_data corpus.jsonl --query_data dev.jsonl --k 100
    python -m raybge.evaluate --encoder runs/mine --corpus_data beir/scifact --query_data beir/scifact
    python -m raybge.evaluate --encoder runs/mine --mteb_tasks NFCorpus SciFact
    python -m raybge.evaluate --help

From Python: `raybge.evaluate_retrieval(model_name_or_path=..., corpus_data=..., query_data=...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from raybge.cli.console import Console
from raybge.cli.options import EvaluateOptions
from raybge.cli.run import call_command, run_command
from raybge.cli.signatures import with_keywords

if TYPE_CHECKING:
    from raybge.cli.options.searching_keywords import EvaluateKeywords
    from raybge.evaluation.run import EvaluationResult


@with_keywords(EvaluateOptions)
def evaluate_retrieval(**flags: Unpack[EvaluateKeywords]) -> EvaluationResult:
    """Evaluate retrieval.

    Args:
        **flags: the command's flags, listed below.

    Returns:
        The metrics by name, such as "nDCG@10", counts, and differences to the other models of `compare`.

    Raises:
        UserError: flags, files or rows that cannot be used; before any model is loaded.
    """
    return call_command(EvaluateOptions, _evaluate, flags)


def _evaluate(options: EvaluateOptions, console: Console) -> EvaluationResult:
    from raybge.evaluation.run import evaluate  # imported here, so that --help is fast

    return evaluate(options, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_command(EvaluateOptions, _evaluate, "evaluate", argv)


if __name__ == "__main__":
    raise SystemExit(main())
