"""Exported models on disk: those of a folder of `raybge.export`, and a cache by the digest of the model.

A folder of the cache is written aside and renamed: an existing one is complete, whichever process wrote it.
"""

from __future__ import annotations

import json
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from raybge.model.backends.choice import ONNX, BackendChoice
from raybge.model.backends.export_process import RECORD, ExportRequest, run_export
from raybge.model.model_identity import model_identity, weights_identity
from raybge.util.atomic_write import atomic_folder
from raybge.util.digest import digest
from raybge.util.errors import UserError
from raybge.util.filesystem import append_to_path, filesystem

# Arguments of an Encoder that an export depends on, besides the model's files.
_SETTINGS = ("config_name", "tokenizer_name", "use_fast_tokenizer", "trust_remote_code")
_PLACE = ("model_name_or_path", "cache_dir", "token")  # where the model is loaded from
_SUCCESS = "_SUCCESS"  # written last into a folder at a URI


@dataclass(frozen=True)
class ExportedModel:
    """An exported model.

    Args:
        folder: path or URI of the folder that holds `choice.file`.
        choice: backend and precision.
        record: content of the record next to the file.
    """

    folder: str
    choice: BackendChoice
    record: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Digest of the file."""
        return str(self.record["digest"])

    def describe(self) -> str:
        """Return the plan line."""
        cosine = self.record["cosine"]
        return (
            f"backend: {self.choice.backend}, {self.choice.precision}; the exported model's cosine to fp32 is "
            f"{cosine['mean']:.4f} on average, at least {cosine['min']:.4f} ({cosine['texts']} sample texts)"
        )

    def local_file(self) -> str:
        """Return the path of the model's file on this machine; a folder at a URI is copied first."""
        files, root = filesystem(self.folder)
        if isinstance(files, pafs.LocalFileSystem):
            return os.path.join(root, self.choice.file)
        copy = Path(tempfile.gettempdir(), f"raybge-{os.getuid()}", f"export-{self.digest}")
        if not copy.is_dir():
            partial = copy.with_name(f"{copy.name}.{uuid.uuid4().hex}.tmp")
            partial.mkdir(mode=0o700, parents=True)
            pafs.copy_files(root, str(partial), source_filesystem=files)
            try:
                partial.rename(copy)
            except OSError:  # another process of this machine was faster
                shutil.rmtree(partial)
        return str(copy / self.choice.file)


def find_exported(keywords: Mapping[str, Any], choice: BackendChoice) -> ExportedModel | None:
    """Find the export of a model: in its own folder if `raybge.export` wrote that, else in the cache.

    Args:
        keywords: all keyword arguments of the `Encoder`, or those that an export depends on and `export_dir`.
        choice: backend and precision.

    Returns:
        The exported model; None if there is none.

    Raises:
        UserError: the exported files in the model's folder are those of another model.
    """
    name = keywords["model_name_or_path"]
    if not keywords.get("config_name") and (own := _read(name, choice)):
        if own.record["model"] != weights_identity(name):
            raise UserError(
                f"{name}/{choice.file} was exported from other weights than those of this folder: run raybge.export "
                "again, or delete it"
            )
        return own
    return _read(_cache_folder(keywords, choice), choice)


def find_or_export(keywords: Mapping[str, Any], choice: BackendChoice) -> ExportedModel:
    """Find the export of a model like `find_exported`, or make it in the cache.

    Args:
        keywords: all keyword arguments of the `Encoder`, or those that an export depends on and `export_dir`.
        choice: backend and precision.

    Returns:
        The exported model.

    Raises:
        UserError: the model cannot be exported, or a package is missing.
    """
    if exported := find_exported(keywords, choice):
        return exported
    choice.check_installed()
    folder = _cache_folder(keywords, choice)
    local = isinstance(filesystem(folder)[0], pafs.LocalFileSystem)
    with tempfile.TemporaryDirectory(prefix="raybge-export-") as scratch:
        with atomic_folder(folder, "--storage_path", last=None if local else _SUCCESS, keep_existing=True) as partial:
            target = partial if local else scratch
            # Lengths and instructions of this call would change what int8 is calibrated on.
            shared = {name: keywords[name] for name in (*_SETTINGS, *_PLACE) if name in keywords}
            run_export(export_request(shared, choice, target))
            if not local:
                pafs.copy_files(scratch, partial, destination_filesystem=filesystem(folder)[0])
    exported = _read(folder, choice)
    assert exported is not None
    return exported


def export_request(keywords: Mapping[str, Any], choice: BackendChoice, folder: str, **more: Any) -> ExportRequest:
    """Return the request to export a model.

    Args:
        keywords: keyword arguments of the `Encoder`; those of the backend are left out.
        choice: backend and precision.
        folder: folder to write into.
        **more: further fields of the request.

    Returns:
        The request.
    """
    own = {"encode_backend", "encode_precision", "export_dir", "devices", "use_fp16", "use_bf16", "lora"}
    encoder = {name: value for name, value in keywords.items() if name not in own}
    return ExportRequest(encoder, choice.backend, _file_precision(choice), folder, **more)


def _file_precision(choice: BackendChoice) -> str:
    return "int8" if choice.precision == "int8" else "fp32"


def _cache_folder(keywords: Mapping[str, Any], choice: BackendChoice) -> str:
    """Return the folder of a model's export in the cache: its name is a digest of all that the export depends on."""
    export_dir = keywords.get("export_dir") or str(
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "raybge", "exports")
    )
    settings = {name: keywords[name] for name in _SETTINGS}
    packages = ("torch", "transformers", *(("onnx",) if choice.backend == ONNX else ("openvino", "nncf")))
    identity = model_identity(keywords["model_name_or_path"], keywords.get("cache_dir"))
    return append_to_path(export_dir, f"/{digest(identity, choice.file, settings, [*map(_version, packages)])}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _read(folder: str, choice: BackendChoice) -> ExportedModel | None:
    """Return the exported model of a folder; None if it has none with a record."""
    if "://" not in folder and not os.path.isdir(folder):
        return None
    files, root = filesystem(folder)
    path = posixpath.join(root, choice.file + RECORD)
    needed = [path] if isinstance(files, pafs.LocalFileSystem) else [path, posixpath.join(root, _SUCCESS)]
    if not all(files.get_file_info(each).is_file for each in needed):
        return None
    with files.open_input_stream(path) as stream:
        record = json.loads(stream.read())
    return ExportedModel(folder, choice, record)
