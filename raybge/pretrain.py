"""Pre-train an encoder for retrieval on raw text, one {"text": ...} per line, with RetroMAE or DupMAE.

    python -m raybge.pretrain --model_name_or_path bert-base-uncased --train_data texts.jsonl --output_dir runs/retro
    python -m raybge.train --model_name_or_path runs/retro/encoder_model ...

From Python: `raybge.pretrain_retromae(model_name_or_path=..., train_data=..., output_dir=..., learning_rate=1e-4)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from raybge.cli.console import Console
from raybge.cli.options import PretrainOptions
from raybge.cli.run import call_command, run_command
from raybge.cli.signatures import with_keywords

if TYPE_CHECKING:
    from raybge.cli.options.training_keywords import PretrainKeywords
    from raybge.training.training_result import TrainingResult


@with_keywords(PretrainOptions)
def pretrain_retromae(**flags: Unpack[PretrainKeywords]) -> TrainingResult:
    """Pre-train an encoder with RetroMAE (https://arxiv.org/abs/2205.12035) or DupMAE (https://arxiv.org/abs/2211.08769).

    Args:
        **flags: the command's flags, listed below.

    Returns:
        The model's folder, the metrics and the report.

    Raises:
        UserError: before any model loads, flags, files or rows that cannot be used.
    """
    return call_command(PretrainOptions, _pretrain, flags)


def _pretrain(options: PretrainOptions, console: Console) -> TrainingResult:
    from raybge.training.run import pretrain  # imported here, so that --help is fast

    return pretrain(options, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(PretrainOptions, _pretrain, "pretrain", argv)


if __name__ == "__main__":
    raise SystemExit(main())
