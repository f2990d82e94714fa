"""Disks and stores that fail: an object store on top of a folder, and a process that dies at a certain byte."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pyarrow.fs as pafs
from fsspec import register_implementation
from fsspec.implementations.local import LocalFileSystem

from raybge.training.checkpoint import manifest

URI = "faulty://store"


class ProcessDied(ValueError):
    """The process is gone: it performs no further action. raybge retries errors of a store, but no ValueError."""


class Lifetime:
    """Number of actions, changes of a name or bytes written, that a process still performs before it dies."""

    def __init__(self, remaining: int) -> None:
        self.remaining = remaining

    def spend(self, action: str = "") -> None:
        self.remaining -= 1
        if self.remaining < 0:
            raise ProcessDied(action)


class FaultyStore(LocalFileSystem):
    """File system whose `faulty://store/...` is the folder `root`. Calls `before(action)` before each change.

    A test registers a subclass with its folder at fsspec, where raybge finds any other store.
    """

    protocol = "faulty"
    cachable = False
    root = ""

    @staticmethod
    def before(action: str) -> None:
        """Refuse an action by raising an error."""

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        head, separator, rest = str(path).partition("store")
        is_uri = separator and head.startswith("faulty://")
        return super()._strip_protocol(cls.root + rest.partition("?")[0] if is_uri else path)

    def rm(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self.before(f"remove {path}")
        super().rm(path, *args, **kwargs)

    def mv(self, path1: str, path2: str, *args: Any, **kwargs: Any) -> None:
        self.before(f"move {path1}")
        super().mv(path1, path2, *args, **kwargs)

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        if mode == "rb":
            return super()._open(path, mode, *args, **kwargs)
        self.before(f"write {path}")
        return FaultyFile(path, self.before)


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


def use_store(
    root: Any, before: Callable[[str], None] = lambda action: None, kind: type[FaultyStore] = FaultyStore
) -> None:
    """Register a store at fsspec, in place of the previous one: from now on it is `faulty://store`."""
    store = type("RegisteredStore", (kind,), {"root": str(root), "before": staticmethod(before)})
    register_implementation("faulty", store, clobber=True)


@contextmanager
def limit_local_changes(lifetime: "Lifetime") -> Iterator[None]:
    """Have pyarrow's changes of local checkpoint folders spend from `lifetime`."""
    store = type("LocalStore", (FaultyStore,), {"before": staticmethod(lifetime.spend)})()
    local = pafs.PyFileSystem(pafs.FSSpecHandler(store))
    original = manifest.filesystem

    def limited(path: str) -> tuple[pafs.FileSystem, str]:
        target, inner_path = original(path)
        return local if isinstance(target, pafs.LocalFileSystem) else target, inner_path

    with mock.patch("raybge.training.checkpoint.manifest.filesystem", limited):
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
