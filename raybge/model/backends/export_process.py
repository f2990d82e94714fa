"""Process that exports a model: `python -m raybge.model.backends.export_process`, with an `ExportRequest` on stdin.

An export imports large libraries, prints, and takes several times the model's memory: a process of its own keeps that
from the caller's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raybge.model.backends.choice import ONNX, BackendChoice
from raybge.model.backends.sample_texts import library_texts
from raybge.model.model_identity import weights_identity
from raybge.util.digest import files_digest
from raybge.util.errors import UserError

RECORD = ".json"  # appended to an exported file's name: what it was made of
MIN_COSINE = 0.999  # of each text's vectors in an export to fp32: less is another model
_LAST_LINES = 3  # of the output of a process that failed


@dataclass(frozen=True)
class ExportRequest:
    """One export.

    Args:
        encoder: keyword arguments of the `Encoder`.
        backend: "onnx" or "openvino".
        precision: "fp32" or "int8"; bf16 is computed from fp32.
        folder: existing folder to write into.
        whole: also write the model itself, as `Encoder.save` does.
        texts: texts that int8 is calibrated on, and all are compared on; None: those of `library_texts`.
    """

    encoder: Mapping[str, Any]
    backend: str
    precision: str
    folder: str
    whole: bool = False
    texts: Sequence[str] | None = None


def run_export(request: ExportRequest) -> dict[str, Any]:
    """Export a model in a process of its own.

    Args:
        request: the export.

    Returns:
        The record, which is also written next to the exported file.

    Raises:
        UserError: the model cannot be exported.
        RuntimeError: the process ended otherwise, such as for lack of memory.
    """
    with tempfile.TemporaryDirectory(prefix="raybge-export-") as scratch:
        answer = Path(scratch, "answer.json")
        process = subprocess.run(
            [sys.executable, "-m", __spec__.name, str(answer)],
            input=json.dumps(asdict(request)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        content = json.loads(answer.read_text()) if answer.exists() else {}
    if "error" in content:
        raise UserError(content["error"])
    if not content:
        lines = " ".join(process.stdout.strip().splitlines()[-_LAST_LINES:])
        raise RuntimeError(
            f"the export of {request.encoder['model_name_or_path']} ended with {process.returncode}: {lines}"
        )
    return dict(content["record"])


def export(request: ExportRequest) -> dict[str, Any]:
    """Export a model in this process; see `run_export`."""
    from raybge.model.backends.comparison import cosines
    from raybge.model.backends.conversion import convert, sample_token_ids
    from raybge.model.encoder import Encoder

    choice, folder = BackendChoice(request.backend, request.precision), Path(request.folder)
    encoder = Encoder(**{**request.encoder, "devices": "cpu", "use_fp16": False})
    name = str(request.encoder["model_name_or_path"])
    token_ids = sample_token_ids(encoder, library_texts() if request.texts is None else request.texts)
    convert(encoder.model, name, choice, folder, token_ids)
    cosine = cosines(encoder.model, str(folder / choice.file), choice, token_ids)
    if not cosine["mean"] > 0 or (choice.precision == "fp32" and cosine["min"] < MIN_COSINE):
        raise UserError(
            f"the model {name} cannot be exported for --encode_backend {choice.backend}: the exported model's vectors "
            f"have a cosine of {cosine['min']:.3f} with torch's; use torch"
        )
    if request.whole:
        encoder.save(folder)
    source = str(folder) if request.whole else name
    packages = ("onnx", "onnxruntime") if choice.backend == ONNX else ("openvino", "nncf")
    record = {
        "model": weights_identity(source) if Path(source).is_dir() else None,
        "backend": choice.backend,
        "precision": choice.precision,
        "digest": files_digest(exported_files(folder, choice)),
        "cosine": cosine,
        "versions": {package: version(package) for package in ("torch", "transformers", *packages)},
    }
    (folder / (choice.file + RECORD)).write_text(json.dumps(record, indent=2) + "\n")
    return record


def exported_files(folder: Path, choice: BackendChoice) -> list[Path]:
    """Return the files of an exported model: one for ONNX, graph and weights for OpenVINO."""
    path = folder / choice.file
    return [path] if choice.backend == ONNX else [path, path.with_suffix(".bin")]


def main(answer: str) -> None:
    """Read a request, carry it out and write {"record": ...} or {"error": ...} to the file `answer`."""
    try:
        content: dict[str, Any] = {"record": export(ExportRequest(**json.load(sys.stdin)))}
    except UserError as error:
        content = {"error": str(error)}
    Path(answer).write_text(json.dumps(content))


if __name__ == "__main__":
    main(sys.argv[1])
