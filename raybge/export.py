"""Export a model to ONNX or OpenVINO, in fp32 or int8, as a folder that sentence-transformers opens too.

    python -m raybge.export --model_name_or_path runs/mine --output_dir runs/mine-int8
    python -m raybge.export --model_name_or_path runs/mine --output_dir runs/mine-int8 --sample_data corpus.jsonl
    python -m raybge.export --help

From Python: `raybge.export_model(model_name_or_path=..., output_dir=...)`. `--encode_backend openvino
--encode_precision int8` of mining, encoding and evaluation then read the folder's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from raybge.cli.console import Console
from raybge.cli.options import ExportOptions
from raybge.cli.run import call_command, run_command
from raybge.cli.signatures import with_keywords

if TYPE_CHECKING:
    from raybge.cli.options.exporting_keywords import ExportKeywords
    from raybge.exporting.run import ExportResult


@with_keywords(ExportOptions)
def export_model(**flags: Unpack[ExportKeywords]) -> ExportResult:
    """Export a model.

    Args:
        **flags: the command's flags, listed below.

    Returns:
        The folder, and the cosines of its vectors to fp32.

    Raises:
        UserError: flags that cannot be used, or a model that cannot be exported.
    """
    return call_command(ExportOptions, _export, flags)


def _export(options: ExportOptions, console: Console) -> ExportResult:
    from raybge.exporting.run import export  # imported here, so that --help is fast

    return export(options, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_command(ExportOptions, _export, "export", argv)


if __name__ == "__main__":
    raise SystemExit(main())
