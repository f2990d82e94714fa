"""Reading what a checkpoint holds beside its weights: tensors and numbers, never a program."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from raybge.util.errors import UserError, first_line

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# What DeepSpeed's own files hold beside tensors and numbers, as of 0.19: values without any code of their own.
DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
# What the index of a sharded checkpoint describes tensors with.
INDEX = {
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}


@contextlib.contextmanager
def plainly_loaded(checkpoint: str | None, part: str) -> Iterator[None]:
    """UserError, naming checkpoint and part, where a file that is read in here holds more than tensors and numbers.

    What asks torch for more, as PyTorch's sharded checkpoints and DeepSpeed do, is given tensors alone too.
    """
    try:
        check_indexes(checkpoint)
        with torch.serialization.safe_globals(_deepspeed()), _forced():
            yield
    except (pickle.UnpicklingError, EOFError, CheckpointException) as error:
        cause = next((each for each in _causes(error) if isinstance(each, pickle.UnpicklingError | EOFError)), None)
        if cause is None:
            raise
        raise UserError(
            f"the {part} in {checkpoint} is refused: a file there is damaged, or holds other things than tensors and "
            f"numbers, which could run a program when they are read ({_reason(cause)})"
        ) from error


def check_indexes(checkpoint: str | None) -> None:
    """Stop with an UnpicklingError where the index of a sharded checkpoint, which torch unpickles, is not just one."""
    for path in Path(checkpoint).glob("*/.metadata") if checkpoint else ():
        with open(path, "rb") as file:
            IndexReader(file).load()


class IndexReader(pickle.Unpickler):
    """Of a sharded checkpoint's index: knows what is in such, and no other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in an index")
        return super().find_class(module, name)


@contextlib.contextmanager
def _forced() -> Iterator[None]:
    """torch.load takes tensors and numbers alone, whatever it is asked for."""
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        yield
    finally:
        os.environ.pop(FORCED) if before is None else os.environ.update({FORCED: before})


def _deepspeed() -> list[Any]:
    """The classes of DEEPSPEED, where it runs."""
    loaded = [(sys.modules[module], names) for module, names in DEEPSPEED.items() if module in sys.modules]
    return [getattr(module, name) for module, names in loaded for name in names if hasattr(module, name)]


def _reason(error: BaseException) -> str:
    """Without torch's advice to read the file all the same."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for {found[1]}" if found else first_line(error)


def _causes(error: BaseException) -> list[BaseException]:
    """An error, or those of all workers."""
    return [each for each, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
