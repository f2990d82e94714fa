"""All flags of all commands, declared as dataclass fields.

Names and defaults are those of FlagEmbedding 1.4.2's scripts; each flag has one canonical name, and
the spellings of other scripts are aliases. Pooling, normalization, instructions and lengths default to None: the
model's own settings.
cli/parser.py turns the declarations into a parser, a help page and a checked object. Nothing here imports torch.
"""

from __future__ import annotations

from raybge.cli.options.checking import SelftestOptions
from raybge.cli.options.common import CommonOptions, ModelOptions
from raybge.cli.options.exporting import ExportOptions
from raybge.cli.options.merging import MergeOptions
from raybge.cli.options.searching import (
    FILE_FLAGS,
    DemoOptions,
    EncodeOptions,
    EvaluateOptions,
    MineOptions,
    RecipeOptions,
)
from raybge.cli.options.training import NO_EFFECT, REFUSED, LoopOptions, PretrainOptions, TrainOptions, TuneOptions

__all__ = [
    "FILE_FLAGS",
    "NO_EFFECT",
    "REFUSED",
    "CommonOptions",
    "DemoOptions",
    "EncodeOptions",
    "EvaluateOptions",
    "ExportOptions",
    "LoopOptions",
    "MergeOptions",
    "MineOptions",
    "ModelOptions",
    "PretrainOptions",
    "RecipeOptions",
    "SelftestOptions",
    "TrainOptions",
    "TuneOptions",
]
