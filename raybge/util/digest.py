"""Digests that are equal in every process and on every machine: names of cached files and identities of runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import is_dataclass
from pathlib import Path

import numpy as np


def digest(*values: object) -> str:
    """Return 32 hexadecimal digits that identify JSON values; the order of keys does not count."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def fingerprint(value: object) -> str:
    """Return 24 hexadecimal digits that identify plain values, arrays and objects that hold them.

    Objects are identified by their attributes, arrays by data type, shape and bytes. Sets are not supported: their
    order differs between processes.
    """
    state = hashlib.blake2b(digest_size=12)

    def feed(part: object) -> None:
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        elif isinstance(part, dict):
            feed(sorted(part.items()))
        elif isinstance(part, list | tuple):
            state.update(f"[{len(part)}".encode())
            for each in part:
                feed(each)
        elif is_dataclass(part) or hasattr(part, "__dict__"):
            feed(vars(part))
        else:
            state.update(repr(part).encode() + b";")

    feed(value)
    return state.hexdigest()


def files_digest(paths: Iterable[str | Path]) -> str:
    """Return 32 hexadecimal digits that identify the content of files and their base names."""
    state = hashlib.blake2b(digest_size=16)
    for path in sorted(map(Path, paths)):
        with path.open("rb") as file:
            state.update(f"{path.name}\0".encode())
            state.update(hashlib.file_digest(file, "blake2b").digest())
    return state.hexdigest()
