"""Files of weights, checked without reading a tensor: pointers of Git LFS, and files that are cut off.

Importing this module imports no torch, so a command checks its models before it loads them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from raybge.util.errors import UserError, first_line

# In the order in which transformers prefers them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_POINTER = b"version https://git-lfs"
_PICKLE = b"\x80"  # files of torch before version 1.6, which have no table of contents
_NEEDED = "copy the file again"


def check_weight_files(folder: str | Path, names: Sequence[str] = WEIGHTS) -> None:
    """Raise UserError if the weights that a folder is loaded from are missing, cut off or a pointer of Git LFS.

    Args:
        folder: folder of the weights.
        names: file names in the order of preference; the first that exists is checked, with the shards of an index.
    """
    name = next((each for each in names if (Path(folder) / each).is_file()), None)
    if name is None:
        raise UserError(f"no weights here, expected one of {', '.join(names)}")
    path = Path(folder) / name
    check_not_pointer(path)
    if not name.endswith(".index.json"):
        _tensor_names(path)
        return
    shards = read_index(path)
    for shard in sorted(set(shards.values())):
        if not (path.parent / shard).is_file():
            raise UserError(f"{path.parent / shard} is missing, which {name} refers to: {_NEEDED}")
        names_inside = _tensor_names(path.parent / shard)
        absent = sorted(tensor for tensor, file in shards.items() if file == shard and tensor not in names_inside)
        if absent and names_inside:
            raise UserError(
                f"{path.parent / shard}: the tensor {absent[0]} is missing, which {name} refers to: {_NEEDED}"
            )


def read_index(path: Path) -> dict[str, str]:
    """Return the file name of each tensor from the index of a model in shards.

    Args:
        path: the index.

    Returns:
        File names by the names of their tensors.

    Raises:
        UserError: the file is not such an index.
    """
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not shards or not all(isinstance(name, str) for name in shards.values()):
            raise TypeError
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: expected a JSON object with a weight_map from tensor names to file names") from error
    return dict(shards)


def check_not_pointer(path: str | Path) -> None:
    """Raise UserError if a file cannot be read, is empty, or is a pointer that Git LFS leaves in place of a file."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(_POINTER))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if head == _POINTER:
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder")
    if not head:
        raise UserError(f"{path} is empty: {_NEEDED}")


def _tensor_names(path: Path) -> frozenset[str]:
    """Return the names of a file's tensors after a check of its table of contents; none for a pickle."""
    check_not_pointer(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                return frozenset(file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is damaged or cut off ({first_line(error)}): {_NEEDED}") from error
    with open(path, "rb") as stream:
        if stream.read(1) == _PICKLE:
            return frozenset()
    try:
        with zipfile.ZipFile(path) as archive:
            archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut off ({first_line(error)}): {_NEEDED}") from error
    return frozenset()
