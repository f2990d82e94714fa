"""State of the process that a library call must leave as it was."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_lock = threading.Lock()
_calls = 0  # under way in all threads
_restores = ExitStack()


@contextmanager
def preserve_process_state() -> Iterator[None]:
    """Restore the state of this process at the end of the block, however it ends.

    This includes environment variables, the handlers of SIGINT and SIGTERM, `sys.excepthook`, the root logger and the
    level of Ray's, warning filters and the random generators of Python, numpy and torch. Ray and transformers change
    most of them; so does raybge itself, for the processes that it starts. Of blocks that overlap in several threads,
    the last one restores the state before the first. What other threads change during the block is reset too.
    """
    global _calls
    with _lock:
        if not _calls:
            _record(_restores)
        _calls += 1
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            if not _calls:
                _restores.close()


@contextmanager
def preserve_environment() -> Iterator[None]:
    """Restore the environment variables at the end of the block, within a larger block as well."""
    before = dict(os.environ)
    try:
        yield
    finally:
        _restore_environment(before)


def _record(stack: ExitStack) -> None:
    stack.enter_context(warnings.catch_warnings())
    stack.callback(_restore_environment, dict(os.environ))
    stack.callback(setattr, sys, "excepthook", sys.excepthook)
    ray_logger = logging.getLogger("ray")
    stack.callback(ray_logger.setLevel, ray_logger.level)
    stack.callback(_restore_root_logger, logging.root.level, list(logging.root.handlers))
    stack.callback(random.setstate, random.getstate())
    for restore, state in _library_generators():
        stack.callback(restore, state)
    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(_restore_handler, number, signal.getsignal(number))


def _restore_handler(number: int, handler: Any) -> None:
    # Only the main thread may install handlers. None: not installed by Python, which cannot restore it.
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def _restore_root_logger(level: int, handlers: list[logging.Handler]) -> None:
    logging.root.setLevel(level)
    logging.root.handlers[:] = handlers


def _library_generators() -> list[tuple[Callable[[Any], Any], Any]]:
    """Return (function that restores it, state) of the generators of libraries that are imported."""
    generators: list[tuple[Callable[[Any], Any], Any]] = []
    if numpy := sys.modules.get("numpy"):
        generators.append((numpy.random.set_state, numpy.random.get_state()))
    if torch := sys.modules.get("torch"):
        generators.append((torch.random.set_rng_state, torch.random.get_rng_state()))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            generators.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return generators
