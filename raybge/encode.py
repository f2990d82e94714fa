r"""Encode rows of text as vectors, on all devices of a cluster, in the order of the input.

    python -m raybge.encode --model_name_or_path runs/mine --input_file corpus.jsonl --output_file corpus.parquet
    python -m raybge.encode --model_name_or_path runs/mine --input_file dev.jsonl --output_file dev.npy \
        --text_field query --kind query
    python -m raybge.encode --help

From Python: `raybge.encode_dataset(model_name_or_path=..., input_file=..., output_file=...)`, or with a Ray Dataset.

Encoded blocks are kept next to the output, or under `--storage_path`: an interrupted run continues from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack, overload

from raybge.cli.console import Console
from raybge.cli.options import EncodeOptions
from raybge.cli.run import call_command, errors_name_arguments, run_command
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
    """Encode rows of text.

    Args:
        dataset: a Ray Dataset, in place of `input_file` and `output_file`.
        **flags: the command's flags, listed below.

    Returns:
        The output file, its width and counts. With `dataset`: the Dataset with a column `embedding` of fixed-size
        lists, computed on reading.

    Raises:
        UserError: flags, files or rows that cannot be used; before any model is loaded.
    """
    if dataset is None:
        return call_command(EncodeOptions, _encode, flags)
    from raybge.encoding.ray_dataset import encode_ray_dataset

    with errors_name_arguments(EncodeOptions):
        return encode_ray_dataset(dataset, flags)


def _encode(options: EncodeOptions, console: Console) -> EncodingResult:
    from raybge.encoding.run import encode  # imported here, so that --help is fast

    return encode(options, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_command(EncodeOptions, _encode, "encode", argv)


if __name__ == "__main__":
    raise SystemExit(main())
