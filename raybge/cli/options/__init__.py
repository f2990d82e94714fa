"""Every flag of every command, declared once as dataclass fields.

Names and defaults are those of FlagEmbedding 1.4.2's scripts, so that its users can move over without relearning.
`None` as the default of pooling, normalising, instructions and lengths means «what the model's folder says».
How a declaration becomes a parser, a help page and a checked object is in `flags.py`. Nothing here imports torch.
"""

from __future__ import annotations

from raybge.cli.options.common import CommonArguments, ModelArguments
from raybge.cli.options.merging import MergeArguments
from raybge.cli.options.retrieval import (
    DemoArguments,
    EncodeArguments,
    EvaluateArguments,
    MineArguments,
    RecipeArguments,
)
from raybge.cli.options.training import REFUSED, LoopArguments, PretrainArguments, TrainArguments, TuneArguments

__all__ = [
    "REFUSED",
    "CommonArguments",
    "DemoArguments",
    "EncodeArguments",
    "EvaluateArguments",
    "LoopArguments",
    "MergeArguments",
    "MineArguments",
    "ModelArguments",
    "PretrainArguments",
    "RecipeArguments",
    "TrainArguments",
    "TuneArguments",
]
