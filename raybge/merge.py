r"""Merge models of one architecture into one, as LM-Cocktail does (https://arxiv.org/abs/2311.13534).

Fine-tuning costs general ability; merging the fine-tuned model with its base model restores it.

    python -m raybge.merge --model_names_or_paths runs/mine BAAI/bge-small-en-v1.5 --model_type encoder \
        --weights 0.5 0.5 --output_path runs/mixed
    python -m raybge.merge --model_names_or_paths runs/mine BAAI/bge-small-en-v1.5 --model_type encoder \
        --search dev.jsonl --general other.jsonl --output_path runs/mixed
    python -m raybge.merge --help

From Python: `raybge.mix_models`, `mix_models_with_data` and `mix_models_by_layers`, called as in LM-Cocktail.

Explicit weights need no Ray: a merged model is written tensor by tensor. Examples and searches are evaluated on Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import MergeOptions
from raybge.cli.run import run_command
from raybge.merging.lm_cocktail import mix_models, mix_models_by_layers, mix_models_with_data

__all__ = ["main", "mix_models", "mix_models_by_layers", "mix_models_with_data"]


def _merge(options: MergeOptions, console: Console) -> Any:
    from raybge.merging.run import merge  # imported here, so that --help is fast

    return merge(options, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(MergeOptions, _merge, "merge", argv)


if __name__ == "__main__":
    raise SystemExit(main())
