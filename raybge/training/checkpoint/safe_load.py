"""Safe loading of checkpoint files: tensors and numbers only, never code."""

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

from raybge.compat.torch import DEEPSPEED_CLASSES, SHARDED_INDEX_NAMES
from raybge.util.errors import UserError, first_line

FORCE_VARIABLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def safe_loading(checkpoint: str | None, part: str) -> Iterator[None]:
    """Restrict every load within the block to tensors and numbers.

    This includes callers that request complete pickles from torch, such as PyTorch's sharded checkpoints and DeepSpeed.

    Args:
        checkpoint: folder that is read; None for none.
        part: part of the checkpoint, for error messages.

    Raises:
        UserError: a file contains anything else, or is damaged.
    """
    try:
        check_indexes(checkpoint)
        with torch.serialization.safe_globals(_deepspeed_classes()), _weights_only():
            yield
    except (pickle.UnpicklingError, EOFError, CheckpointException) as error:
        cause = next((each for each in _causes(error) if isinstance(each, pickle.UnpicklingError | EOFError)), None)
        if cause is None:
            raise
        raise UserError(
            f"the {part} in {checkpoint} is refused: a file there is damaged, or contains more than tensors and "
            f"numbers, which could run a program when loaded ({_reason(cause)})"
        ) from error


def check_indexes(checkpoint: str | None) -> None:
    """Raise an UnpicklingError if the index of a sharded checkpoint, which torch unpickles, contains anything else."""
    for path in Path(checkpoint).glob("*/.metadata") if checkpoint else ():
        with open(path, "rb") as file:
            IndexUnpickler(file).load()


class IndexUnpickler(pickle.Unpickler):
    """Unpickler restricted to the classes and functions of a sharded checkpoint's index."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function of SHARDED_INDEX_NAMES, or a dtype of torch; refuse all others."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in SHARDED_INDEX_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in an index")
        return super().find_class(module, name)


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Make torch.load accept tensors and numbers only, whatever its arguments."""
    previous = os.environ.get(FORCE_VARIABLE)
    os.environ[FORCE_VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(FORCE_VARIABLE) if previous is None else os.environ.update({FORCE_VARIABLE: previous})


def _deepspeed_classes() -> list[Any]:
    """Return the classes of DEEPSPEED_CLASSES if DeepSpeed is loaded."""
    loaded = [(sys.modules[module], names) for module, names in DEEPSPEED_CLASSES.items() if module in sys.modules]
    return [getattr(module, name) for module, names in loaded for name in names if hasattr(module, name)]


def _reason(error: BaseException) -> str:
    """Return the reason without torch's advice to load the file nevertheless."""
    match = re.search(r"GLOBAL (\S+)", str(error))
    return f"it refers to {match[1]}" if match else first_line(error)


def _causes(error: BaseException) -> list[BaseException]:
    """Return the error itself, or those of all workers."""
    return [each for each, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
