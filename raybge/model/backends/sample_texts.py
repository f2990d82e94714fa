"""Sample texts on which an export measures ranges and cosines: docstrings of Python's own library, in English."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Iterator
from types import ModuleType

_MODULES = (
    "argparse asyncio bz2 collections configparser csv datetime decimal difflib fractions functools heapq http.client "
    "inspect ipaddress json logging pathlib random re shutil socket statistics string subprocess tarfile tempfile "
    "textwrap threading typing unittest.mock urllib.request zipfile"
).split()
COUNT = 100
_LENGTHS = (40, 150, 500, 1200, 2500)  # characters, in turn: queries to long passages


def library_texts() -> list[str]:
    """Return texts of different lengths, the same ones for a version of Python."""
    words = itertools.cycle([word for text in _docstrings() for word in text.split()])
    texts = []
    for length in itertools.islice(itertools.cycle(_LENGTHS), COUNT):
        text = next(words)
        while len(text) < length:
            text += f" {next(words)}"
        texts.append(text)
    return texts


def _docstrings() -> Iterator[str]:
    """Yield the docstrings of modules, and of their classes and functions, in a fixed order."""
    for name in _MODULES:
        module = importlib.import_module(name)
        for _, member in [("", module), *sorted(vars(module).items(), key=lambda item: item[0])]:
            if isinstance(member, ModuleType) and member is not module:
                continue
            text = getattr(member, "__doc__", None)
            if isinstance(text, str) and len(text) > 80:
                yield inspect.cleandoc(text)
