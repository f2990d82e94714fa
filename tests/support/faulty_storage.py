"""Disks and stores that fail: an object store on top of a folder, and a process that dies at a certain byte."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.implementations.local import LocalFileSystem

URI = "faulty://store"


class ProcessDied(Exception):
    """The process is gone: it performs no further action."""


class Lifetime:
    """Number of actions, changes of a name or bytes written, that a process still performs before it dies."""

    def __init__(self, remaining: int) -> None:
        self.remaining = remaining

    def spend(self, action: str = "") -> None:
        self.remaining -= 1
        if self.remaining < 0:
            raise ProcessDied(action)


class FaultyStore(pafs.FSSpecHandler):
    """Store whose `faulty://store/...` is the folder `root`. Calls `before(action)` before each change."""

    def __init__(self, root: Any, before: Callable[[str], None] = lambda action: None) -> None:
        super().__init__(LocalFileSystem())
        self.root, self.before = str(root), before

    def filesystem(self, path: str) -> tuple[pafs.FileSystem, str]:
        """Replace raybge's function of the same name."""
        if path.startswith(URI):
            return pafs.PyFileSystem(self), self.root + path.removeprefix(URI).partition("?")[0]
        return pafs.LocalFileSystem(), os.path.abspath(path)

    def filesystem_for_all(self, path: str) -> tuple[pafs.FileSystem, str]:
        """Replace raybge's function, so that changes of local folders call `before` too."""
        return pafs.PyFileSystem(self), self.filesystem(path)[1]

    def delete_dir(self, path):
        self.before(f"remove {path}")
        super().delete_dir(path)

    def delete_file(self, path):
        self.before(f"remove {path}")
        super().delete_file(path)

    def move(self, src, dest):
        self.before(f"move {src}")
        super().move(src, dest)

    def open_output_stream(self, path, metadata):
        self.before(f"write {path}")
        return pa.PythonFile(FaultyFile(path, self.before), mode="w")


class FaultyFile(io.FileIO):
    """File that calls `before` before each byte."""

    def __init__(self, path: Any, before: Callable[[str], None]) -> None:
        super().__init__(path, "w")
        self.before = before

    def write(self, data: Any) -> int:
        for byte in bytes(data):
            self.before(f"write into {self.name}")
            super().write(bytes([byte]))
        return len(data)


@contextmanager
def use_store(store: FaultyStore, local: bool = False) -> Iterator[None]:
    """Have raybge's checkpoints use `store`; with `local`, for changes of local folders too."""
    with ExitStack() as stack:
        for module in ("util.filesystem", "training.checkpoint.writer"):
            stack.enter_context(mock.patch(f"raybge.{module}.filesystem", store.filesystem))
        function = store.filesystem_for_all if local else store.filesystem
        stack.enter_context(mock.patch("raybge.training.checkpoint.manifest.filesystem", function))
        yield


@contextmanager
def limit_lifetime(lifetime: Lifetime) -> Iterator[None]:
    """Have Python's own functions that change a disk spend from `lifetime`."""
    original_open = io.open

    def limited_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode:
            return original_open(path, mode, *args, **kwargs)
        lifetime.spend(f"write {path}")
        return io.TextIOWrapper(FaultyFile(path, lifetime.spend), "utf-8", write_through=True)

    def limited(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            lifetime.spend(f"{function.__name__} {args}")
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        stack.enter_context(mock.patch("io.open", limited_open))
        for name in ("rename", "replace", "fsync", "mkdir"):
            stack.enter_context(mock.patch(f"os.{name}", limited(getattr(os, name))))
        yield
