"""Write the vectors of rows of text, on all of a cluster's devices, in the input's order.

    python -m raybge.encode --model_name_or_path runs/mine --input_file corpus.jsonl --output_file corpus.parquet
    python -m raybge.encode --model_name_or_path runs/mine --input_file dev.jsonl --output_file dev.npy \\
        --text_field query --kind query
    python -m raybge.encode --help

From Python: `raybge.encode_dataset(model_name_or_path=..., input_file=..., output_file=...)`, or with a Ray Dataset.

What is encoded is kept beside the output, or under `--storage_path`: a run that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raybge.cli import run as cli
from raybge.cli.options import EncodeOptions
from raybge.encoding.run import OF_FILES, _encoded_dataset, encode
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset


def encode_dataset(dataset: Dataset | None = None, **flags: Any) -> Any:
    """Encode rows of text; the arguments are the command's flags.

    Args:
        dataset: a Ray Dataset instead of `input_file` and `output_file`.

    Returns:
        The summary. With `dataset`: that Dataset with a column `embedding`, fixed-size lists, computed when it is read.

    Raises UserError, before any model loads, for flags, files or rows that cannot be used.
    """
    if dataset is None:
        return cli.call(EncodeOptions, encode, "encode", flags)
    from raybge.cli.parser import build

    for name in OF_FILES:
        if name in flags:
            raise UserError(f"{name}: a Dataset is encoded as it is; leave it out")
    return _encoded_dataset(dataset, build(EncodeOptions, {**flags, "input_file": "", "output_file": ""}))


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(EncodeOptions, encode, "encode", argv)


if __name__ == "__main__":
    raise SystemExit(main())
