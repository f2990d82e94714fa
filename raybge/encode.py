"""Encode rows of text as vectors, on all devices of a cluster, in the order of the input.

    python -m raybge.encode --model_name_or_path runs/mine --input_file corpus.jsonl --output_file corpus.parquet
    python -m raybge.encode --model_name_or_path runs/mine --input_file dev.jsonl --output_file dev.npy --kind query

From Python: `raybge.encode_dataset(model_name_or_path=..., input_file=..., output_file=...)`, or with a Ray Dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack, overload

from raybge.cli.console import Console
from raybge.cli.options import EncodeOptions
from raybge.cli.run import call_command, run_command
from raybge.cli.signatures import with_keywords

if TYPE_CHECKING:
    from ray.data import Dataset

    from raybge.cli.options.searching_keywords import EncodeDatasetKeywords, EncodeKeywords
    from raybge.encoding.run import EncodingResult


@overload
def encode_dataset(dataset: None = None, **flags: Unpack[EncodeKeywords]) -> EncodingResult: ...
@overload
def encode_dataset(dataset: Dataset, **flags: Unpack[EncodeDatasetKeywords]) -> Dataset: ...
@with_keywords(EncodeOptions)
def encode_dataset(dataset: Dataset | None = None, **flags: Any) -> Any:
    """Encode rows of text; flags, files and rows that cannot be used raise UserError before a model is loaded.

    Args:
        dataset: a Ray Dataset, in place of `input_file` and `output_file`.
        **flags: the command's flags, listed below.

    Returns:
        The result; for a `dataset` the Dataset with a column `embedding` of fixed-size lists, computed on reading.
    """
    if dataset is None:
        return call_command(EncodeOptions, _encode, flags)
    from raybge.encoding.ray_dataset import encode_ray_dataset

    return encode_ray_dataset(dataset, flags)


def _encode(options: EncodeOptions, console: Console) -> EncodingResult:
    from raybge.encoding.run import encode  # imported here, so that --help is fast

    return encode(options, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_command(EncodeOptions, _encode, "encode", argv)


if __name__ == "__main__":
    raise SystemExit(main())
