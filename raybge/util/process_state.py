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


@contextmanager
def preserve_process_state() -> Iterator[None]:
    """Restore the state of this process at the end of the block, however it ends.

    This includes environment variables, the handlers of SIGINT and SIGTERM, the root logger, warning filters and the
    random generators of Python, numpy and torch. Ray and transformers change most of them; so does raybge itself, for
    the processes that it starts. Variables that other threads set meanwhile are reset too.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.callback(_restore_environment, dict(os.environ))
        stack.callback(_restore_root_logger, logging.root.level, list(logging.root.handlers))
        stack.callback(random.setstate, random.getstate())
        for restore, state in _library_generators():
            stack.callback(restore, state)
        if threading.current_thread() is threading.main_thread():  # the only one that may install handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.getsignal(number))
        yield


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
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
