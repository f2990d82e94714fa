"""Reading what a checkpoint holds beside its weights: tensors and numbers, never a program."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator

from raybge.errors import UserError, first_line


@contextlib.contextmanager
def plainly_loaded(checkpoint: str | None, part: str) -> Iterator[None]:
    """UserError, naming checkpoint and part, where torch refuses a file of it that holds more than tensors.

    transformers reads them with torch's `weights_only`, which allows nothing else.
    """
    try:
        yield
    except (pickle.UnpicklingError, EOFError) as error:
        raise UserError(
            f"the {part} in {checkpoint} is refused: a file there is damaged, or holds other things than tensors and "
            f"numbers, which could run a program when they are read ({first_line(error)})"
        ) from error
