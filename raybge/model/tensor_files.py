"""The tensors of a model's files: mapped one by one, and written as safetensors while they are made.

Nothing is read before somebody looks at a tensor's numbers, and what is mapped is the files' own pages, which the
system takes back when memory is short. What is written goes straight to the file: sizes are known beforehand, so the
header comes first (https://huggingface.co/docs/safetensors/index#format).
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

from raybge.util.errors import UserError, first_line

SHARD_BYTES = 5 * 10**9  # a file's tensors, unless one alone is larger
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
    """The tensors of a folder's weights by name, mapped from their files; safetensors where there are both kinds.

    A `.bin` is a pickle, which may run any code: of it only tensors are taken (`weights_only`). UserError where there
    are no weights, or where a file is missing or damaged.
    """
    for name, read in ((_SAFETENSORS, _read_safetensors), (_PICKLE, _read_pickle)):
        files = [folder / name] if (folder / name).is_file() else _listed(folder / f"{name}.index.json")
        if files:
            found: dict[str, Tensor] = {}
            for file in files:
                found |= read(file)
            return found
    raise UserError(f"{folder}: no weights here, expected {_SAFETENSORS} or {_PICKLE}, whole or in parts")


def _listed(index: Path) -> list[Path]:
    """The files that an index names; none without an index."""
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: expected a weight_map of tensors and their files") from error
    return [index.parent / name for name in names]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as tensors alone: {first_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise UserError(f"{path}: expected tensors by name and nothing else")
    return {str(name): tensor.detach() for name, tensor in found.items()}


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written: all but its numbers."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Numbers = Callable[[str], Iterable[Tensor]]


def write_tensors(folder: Path, slots: Iterable[TensorSpec], numbers: Numbers, done: Callable[[], Any]) -> None:
    """Write tensors as `model.safetensors`, or above 5 GB as parts of at most that with an index.

    Args:
        numbers: gives a tensor's numbers by its name, flat, in its dtype, in as many pieces as it likes; it is asked
            once for each, and a piece is written before the next one is made.
        done: called after each tensor.
    """
    shards = shards_of(slots)
    if len(shards) == 1:
        _write_file(folder / _SAFETENSORS, shards[0], numbers, done)
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, numbers, done)
    index = {
        "metadata": {"total_size": sum(slot.bytes for shard in shards for slot in shard)},
        "weight_map": {slot.name: name for name, shard in zip(names, shards, strict=True) for slot in shard},
    }
    (folder / f"{_SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def shards_of(slots: Iterable[TensorSpec], most: int | None = None) -> list[list[TensorSpec]]:
    """The tensors in files of at most `most` bytes (SHARD_BYTES), in their order; at least one file."""
    most = SHARD_BYTES if most is None else most
    shards: list[list[TensorSpec]] = [[]]
    held = 0
    for slot in slots:
        if shards[-1] and held + slot.bytes > most:
            shards.append([])
            held = 0
        shards[-1].append(slot)
        held += slot.bytes
    return shards


def _write_file(path: Path, slots: Iterable[TensorSpec], numbers: Numbers, done: Callable[[], Any]) -> None:
    # the widest numbers first, so that each tensor begins where its dtype may
    slots = sorted(slots, key=lambda slot: (-slot.dtype.itemsize, slot.name))
    header = _header(slots)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for slot in slots:
            end = file.tell() + slot.bytes
            for piece in numbers(slot.name):
                file.write(memoryview(piece.contiguous().view(torch.uint8).numpy()))
            if file.tell() != end:
                raise ValueError(f"{slot.name}: {slot.bytes} bytes were announced, {file.tell() - end:+} came")
            done()


def _header(slots: Iterable[TensorSpec]) -> bytes:
    """What comes before the tensors, its length a multiple of 8."""
    about: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    at = 0
    for slot in slots:
        if slot.dtype not in _CODES:
            raise UserError(f"the tensor {slot.name} is of {slot.dtype}, which is not supported")
        about[slot.name] = {
            "dtype": _CODES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [at, at := at + slot.bytes],
        }
    text = json.dumps(about, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
