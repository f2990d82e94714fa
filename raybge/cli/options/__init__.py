"""Every flag of every command, declared once as dataclass fields.

Names and defaults are those of FlagEmbedding 1.4.2's scripts, so that its users can move over without relearning.
`None` as the default of pooling, normalising, instructions and lengths means «what the model's folder says».
How a declaration becomes a parser, a help page and a checked object is in `flags.py`. Nothing here imports torch.
"""

from __future__ import annotations

from raybge.cli.options.common import CommonOptions, ModelOptions
from raybge.cli.options.merging import MergeOptions
from raybge.cli.options.retrieval import (
    DemoOptions,
    EncodeOptions,
    EvaluateOptions,
    MineOptions,
    RecipeOptions,
)
from raybge.cli.options.training import REFUSED, LoopOptions, PretrainOptions, TrainOptions, TuneOptions

__all__ = [
    "REFUSED",
    "CommonOptions",
    "DemoOptions",
    "EncodeOptions",
    "EvaluateOptions",
    "LoopOptions",
    "MergeOptions",
    "MineOptions",
    "ModelOptions",
    "PretrainOptions",
    "RecipeOptions",
    "TrainOptions",
    "TuneOptions",
]
