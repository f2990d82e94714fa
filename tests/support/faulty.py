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


class Died(Exception):
    """The process is gone: nothing that it would do comes to pass any more."""


class Life:
    """What a process may still do before it dies: change a name, or write a byte."""

    def __init__(self, left: int) -> None:
        self.left = left

    def spend(self, what: str = "") -> None:
        self.left -= 1
        if self.left < 0:
            raise Died(what)


class Store(pafs.FSSpecHandler):
    """A store whose `faulty://store/...` lies in the folder `root`. Before each change it calls `before(what)`."""

    def __init__(self, root: Any, before: Callable[[str], None] = lambda what: None) -> None:
        super().__init__(LocalFileSystem())
        self.root, self.before = str(root), before

    def filesystem(self, path: str) -> tuple[pafs.FileSystem, str]:
        """In place of raybge's own."""
        if path.startswith(URI):
            return pafs.PyFileSystem(self), self.root + path.removeprefix(URI).partition("?")[0]
        return pafs.LocalFileSystem(), os.path.abspath(path)

    def watched(self, path: str) -> tuple[pafs.FileSystem, str]:
        """The same, with folders of this machine asking too."""
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
        return pa.PythonFile(Watched(path, self.before), mode="w")


class Watched(io.FileIO):
    """A file that asks before each byte."""

    def __init__(self, path: Any, before: Callable[[str], None]) -> None:
        super().__init__(path, "w")
        self.before = before

    def write(self, data: Any) -> int:
        for byte in bytes(data):
            self.before(f"write into {self.name}")
            super().write(bytes([byte]))
        return len(data)


@contextmanager
def stored(store: Store, local: bool = False) -> Iterator[None]:
    """raybge's checkpoints see `store` in the block; with `local`, folders are changed through it as well."""
    with ExitStack() as stack:
        for module in ("util.filesystem", "training.checkpoint.writer"):
            stack.enter_context(mock.patch(f"raybge.{module}.filesystem", store.filesystem))
        seen = store.watched if local else store.filesystem
        stack.enter_context(mock.patch("raybge.training.checkpoint.manifest.filesystem", seen))
        yield


@contextmanager
def mortal(life: Life) -> Iterator[None]:
    """Python's own ways to change a disk ask `life` in the block."""
    open_file = io.open

    def opened(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if "w" not in mode:
            return open_file(path, mode, *more, **named)
        life.spend(f"write {path}")
        return io.TextIOWrapper(Watched(path, life.spend), "utf-8", write_through=True)

    def asking(function: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*given: Any, **named: Any) -> Any:
            life.spend(f"{function.__name__} {given}")
            return function(*given, **named)

        return changed

    with ExitStack() as stack:
        stack.enter_context(mock.patch("io.open", opened))
        for name in ("rename", "replace", "fsync", "mkdir"):
            stack.enter_context(mock.patch(f"os.{name}", asking(getattr(os, name))))
        yield
