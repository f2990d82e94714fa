"""Pre-train an encoder for retrieval on raw text, one {"text": ...} a line, with RetroMAE or DupMAE.

    python -m raybge.pretrain --model_name_or_path bert-base-uncased --train_data texts.jsonl --output_dir runs/retro
    python -m raybge.train --model_name_or_path runs/retro/encoder_model ...

From Python: `raybge.pretrain_retromae(model_name_or_path=..., train_data=..., output_dir=..., learning_rate=1e-4)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raybge.cli import run as cli
from raybge.cli.options import PretrainOptions
from raybge.training.run import pretrain


def pretrain_retromae(**flags: Any) -> dict[str, float]:
    """Pre-train an encoder; the arguments are the command's flags. Returns the Trainer's metrics.

    Raises UserError, before any model loads, for flags, files or rows that cannot be used.
    """
    return cli.call(PretrainOptions, pretrain, "pretrain", flags)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(PretrainOptions, pretrain, "pretrain", argv)


if __name__ == "__main__":
    raise SystemExit(main())
