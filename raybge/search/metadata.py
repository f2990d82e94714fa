"""OUTPUT.meta.json: what an output file was made of and with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from raybge.util.atomic_write import open_atomic
from raybge.util.filesystem import append_to_path
from raybge.util.redaction import redact_settings


def metadata_path(output_file: str) -> str:
    """Return the path of the metadata file, next to the output."""
    return append_to_path(output_file, ".meta.json")


def write_metadata(output_file: str, options: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Write the metadata of an output.

    Args:
        output_file: value of `--output_file`.
        options: the command's options; they are written without secrets.
        values: further JSON values, equal for two runs with equal outputs: no times, no host names.
    """
    content = {"options": redact_settings(options), **values}
    with open_atomic(metadata_path(output_file), "--output_file") as out:
        out.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
