"""Parts of torch without a stability promise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any


def replace_rendezvous_store(store: Callable[..., Any]) -> None:
    """Have this process's next process group create its TCPStore by calling `store`.

    `init_process_group` gives no access to the address that its TCPStore listens at: all interfaces, and the store asks
    for no password. The module is found through one of its functions, since the attribute
    `torch.distributed.rendezvous` is a function of the same name.

    Args:
        store: called with the arguments of `torch.distributed.TCPStore`.
    """
    from torch.distributed.rendezvous import _create_c10d_store

    sys.modules[_create_c10d_store.__module__].TCPStore = store  # type: ignore[attr-defined]


def set_logged_rates(scheduler: Any, rates: Sequence[float]) -> None:
    """Set the learning rates that `scheduler.get_last_lr()` returns until the next step.

    A scheduler only updates them in `step()`, but transformers logs them before, when a run resumes with another
    learning rate.
    """
    scheduler._last_lr = list(rates)
