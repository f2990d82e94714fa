"""Tensors of model files: memory-mapped for reading, and written as safetensors while they are computed.

A tensor's data is read on first access. Mapped memory consists of the files' own pages, which the operating system
reclaims when memory is short. Sizes are known before writing, so the header is written first and the data is streamed
(https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raybge.model.weight_files import read_index
from raybge.util.errors import UserError, first_line

SHARD_BYTES = 5 * 10**9  # maximal size of a file with several tensors
_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# --- reading ----------------------------------------------------------------------------------------------------------


def mapped_tensors(folder: Path) -> dict[str, Tensor]:
    """Map the weights of a folder by name; safetensors if both formats are present.

    A `.bin` file is a pickle, which may run any code: only tensors are loaded from it (`weights_only`).

    Args:
        folder: a model's folder.

    Returns:
        Tensors by name.

    Raises:
        UserError: no weights, or a file is missing or damaged.
    """
    for name, read in ((_SAFETENSORS, _read_safetensors), (_PICKLE, _read_pickle)):
        index = folder / f"{name}.index.json"
        files = [folder / name] if (folder / name).is_file() else []
        if not files and index.is_file():
            files = [folder / shard for shard in sorted(set(read_index(index).values()))]
        if files:
            tensors: dict[str, Tensor] = {}
            for file in files:
                tensors |= read(file)
            return tensors
    raise UserError(f"{folder}: no weights here, expected {_SAFETENSORS} or {_PICKLE}, in one file or in shards")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as tensors alone: {first_line(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path}: expected a dict of tensors by name and nothing else")
    return {str(name): tensor.detach() for name, tensor in tensors.items()}


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


TensorData = Callable[[str], Iterable[Tensor]]


def write_tensors(folder: Path, specs: Iterable[TensorSpec], data: TensorData, done: Callable[[], Any]) -> None:
    """Write tensors as `model.safetensors`, or above 5 GB as shards of at most that size with an index.

    Args:
        folder: an existing folder.
        specs: names, dtypes and shapes of the tensors.
        data: returns the data of the tensor of that name, flattened and in its dtype, in one or more pieces; it is
            called once per tensor, and each piece is written before the next one is computed.
        done: called after each tensor.
    """
    shards = shards_of(specs)
    if len(shards) == 1:
        _write_file(folder / _SAFETENSORS, shards[0], data, done)
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, data, done)
    index = {
        "metadata": {"total_size": sum(spec.bytes for shard in shards for spec in shard)},
        "weight_map": {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard},
    }
    (folder / f"{_SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def shards_of(specs: Iterable[TensorSpec], limit: int | None = None) -> list[list[TensorSpec]]:
    """Group tensors in their order into files of at most `limit` bytes (default: SHARD_BYTES); at least one file."""
    limit = SHARD_BYTES if limit is None else limit
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.bytes
    return shards


def _write_file(path: Path, specs: Iterable[TensorSpec], data: TensorData, done: Callable[[], Any]) -> None:
    # the widest dtypes first, so that each tensor is aligned for its dtype
    specs = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))
    header = _header(specs)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for spec in specs:
            end = file.tell() + spec.bytes
            for piece in data(spec.name):
                file.write(memoryview(piece.contiguous().view(torch.uint8).numpy()))
            if file.tell() != end:
                raise ValueError(
                    f"{spec.name}: expected {spec.bytes} bytes of data, found {file.tell() - end + spec.bytes}"
                )
            done()


def _header(specs: Iterable[TensorSpec]) -> bytes:
    """Return the file's header, padded to a multiple of 8 bytes."""
    entries: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        if spec.dtype not in _CODES:
            raise UserError(
                f"the tensor {spec.name} has the dtype {spec.dtype}: expected one of {', '.join(map(str, _CODES))}"
            )
        entries[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset := offset + spec.bytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
