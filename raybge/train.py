r"""Fine-tune an embedding model on groups {"query", "pos", "neg"}.

    python -m raybge.train --model_name_or_path BAAI/bge-small-en-v1.5 --train_data groups.jsonl --output_dir runs/mine
    python -m raybge.train --model_name_or_path BAAI/bge-small-en-v1.5 --train_data groups.jsonl \
        --output_dir runs/mine --learning_rate 2e-5 --per_device_train_batch_size 32 --eval_data dev.jsonl \
        --eval_strategy epoch --resume
    python -m raybge.train --help

From Python: `raybge.finetune(model_name_or_path=..., train_data=..., output_dir=..., learning_rate=2e-5)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from raybge.cli.console import Console
from raybge.cli.options import TrainOptions
from raybge.cli.run import call_command, run_command
from raybge.cli.signatures import with_keywords

if TYPE_CHECKING:
    from raybge.cli.options.training_keywords import TrainKeywords
    from raybge.training.training_result import TrainingResult


@with_keywords(TrainOptions)
def finetune(**flags: Unpack[TrainKeywords]) -> TrainingResult:
    """Fine-tune an embedding model with a contrastive objective.

    Args:
        **flags: the command's flags, listed below.

    Returns:
        The model's folder, the metrics and the report.

    Raises:
        UserError: before any model loads, flags, files or rows that cannot be used.
    """
    return call_command(TrainOptions, _train, flags)


def _train(options: TrainOptions, console: Console) -> TrainingResult:
    from raybge.training.run import train  # imported here, so that --help is fast

    return train(options, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(TrainOptions, _train, "train", argv)


if __name__ == "__main__":
    raise SystemExit(main())
