"""Iteration whose next item is computed in a thread while the current one is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
_END: Any = object()


def computed_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items of an iterable in order, one of them computed ahead in a thread.

    Args:
        items: the iterable; it gains where it releases Python's lock, as tokenizers written in Rust do.

    Yields:
        The items. An error in the thread is raised where its item would follow.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, iterator, _END)
        while (item := upcoming.result()) is not _END:
            upcoming = thread.submit(next, iterator, _END)
            yield item
