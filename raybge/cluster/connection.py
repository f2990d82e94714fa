"""Connect to Ray: join a cluster, or start Ray on this machine with CPU slots that only reading uses."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raybge.cluster.resources import Cluster, available_cores, read_cluster, reading_slots
from raybge.compat.ray import ports_on_loopback
from raybge.util.errors import UserError

# Lets Ray listen to other machines; its name mentions Windows and macOS, but it works on Linux as well.
LISTEN_TO_OTHERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@dataclass
class _OwnRay:
    """Ray that this process started.

    Args:
        address: distinguishes it from a Ray that the program starts after it has stopped this one.
        settings: environment variables, working directory and output that its processes inherited.
        is_idle: no block uses it; it was kept for the next one.
    """

    address: str
    settings: dict[str, str] = field(repr=False)
    is_idle: bool = False


_own: _OwnRay | None = None


@contextmanager
def connect(
    address: str | None = None, verbose: bool = False, messages: bool = True, keep: bool = False
) -> Iterator[Cluster]:
    """Join a Ray cluster, or start Ray here and stop it at the end of the `with` block.

    An existing connection of this process is used and left as it is.

    Args:
        address: cluster to join; default: RAY_ADDRESS, else a live `ray start` of this machine, else Ray is started.
        verbose: keep the progress bars of Ray Data.
        messages: write Ray's messages, and what its processes write, to this process's output.
        keep: leave a Ray that was started here to the next block with the same settings; Ray itself stops it when the
            process exits. After an error it is stopped at once, with all that still runs in it. Outside of the main
            thread nothing is kept: Ray's processes end with the thread that started them.

    Yields:
        The cluster's resources.

    Raises:
        UserError: the cluster cannot be joined.
    """
    target = address or os.environ.get("RAY_ADDRESS") or _live_head()
    is_local = target in (None, "local")
    if is_local:
        # Ray reads this when it is imported: its ports stay on the loopback interface of a single machine.
        os.environ.setdefault(LISTEN_TO_OTHERS, "0")
    import ray

    _set_environment(verbose)
    settings = {**os.environ, "working directory": os.getcwd(), "messages": str(messages)}
    with ExitStack() as stack:
        stack.enter_context(_data_context(verbose))
        reused = _idle_ray(settings if is_local else None)
        if ray.is_initialized() and not reused:
            yield current_cluster()
            return
        if not reused and is_local:
            if os.environ.get(LISTEN_TO_OTHERS) == "0":
                stack.enter_context(ports_on_loopback())
            _start(messages, settings)
        elif not reused:
            _join(str(target), messages)
        else:  # ray.init sets it, and preserve_process_state restored it after the earlier call
            logging.getLogger("ray").setLevel(_output_options(messages)["logging_level"])
        stack.callback(_stop_unless_idle)
        yield current_cluster()
        if keep and _own and threading.current_thread() is threading.main_thread():
            _own.is_idle = True


def joins_cluster(address: str | None = None) -> bool:
    """Return True if `connect` joins a cluster, which may have other machines; False if it starts Ray here.

    Args:
        address: as for `connect`.

    Returns:
        True for an existing connection of this process too, unless `connect` has started that Ray.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return not _own
    return (address or os.environ.get("RAY_ADDRESS") or _live_head()) not in (None, "local")


def current_cluster() -> Cluster:
    """Return the present resources of the cluster that this process is connected to."""
    return read_cluster(_is_own())


def _is_own() -> bool:
    """Return True if this process started the Ray that it is connected to."""
    import ray

    return _own is not None and ray.is_initialized() and ray.get_runtime_context().gcs_address == _own.address


def _idle_ray(settings: Mapping[str, str] | None) -> bool:
    """Take the Ray that an earlier block left, if it was started with the same settings; otherwise stop it.

    Settings that only its start had are those of libraries that were imported then.
    """
    if not (_own and _own.is_idle and _is_own()):
        return False
    _own.is_idle = False
    if settings and settings.items() <= _own.settings.items():
        return True
    _stop_unless_idle()
    return False


def _stop_unless_idle() -> None:
    global _own
    import ray

    if not (_own and _own.is_idle):
        ray.shutdown()
        _own = None


def address_file() -> Path:
    """Return the file in which `ray start` records its address.

    Ray is not imported: the variables that have to be set before its import depend on this file.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(folder) / "ray" / "ray_current_cluster"


def _start(messages: bool, settings: dict[str, str]) -> None:
    global _own
    import ray

    options: dict[str, Any] = {"num_cpus": available_cores() + reading_slots(), "include_dashboard": False}
    ray.init(address="local", **options, **_output_options(messages))
    _own = _OwnRay(ray.get_runtime_context().gcs_address, settings)


def _join(address: str, messages: bool) -> None:
    import ray

    # Ray itself retries an address without a server for minutes.
    if re.fullmatch(r"[^/]+:\d+", address) and not _answers(address):
        raise UserError(f"cannot join the Ray cluster at {address}: nothing answers there")
    try:
        ray.init(address=address, **_output_options(messages))
    except Exception as error:  # Ray raises ConnectionError, RuntimeError and its own kinds for the same cause
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot join the Ray cluster at {address}: {reason}") from error


def _live_head() -> str | None:
    """Return the address of a `ray start` on this machine that still answers: a dead head leaves its file behind."""
    path = address_file()
    if not path.is_file():
        return None
    address = path.read_text().strip()
    return address if _answers(address) else None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return True
    except (OSError, ValueError):
        return False


def _output_options(messages: bool) -> dict[str, Any]:
    """Return the options of ray.init for the output of Ray and its processes."""
    return {"log_to_driver": messages, "logging_level": logging.INFO if messages else logging.WARNING}


def _set_environment(verbose: bool) -> None:
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about a future default
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if not verbose else "true")


@contextmanager
def _data_context(verbose: bool) -> Iterator[None]:
    """Set Ray Data's options of this process for the duration of the block."""
    from ray.data import DataContext

    context = DataContext.get_current()
    options = context.execution_options
    before = context.enable_progress_bars, options.preserve_order
    context.enable_progress_bars, options.preserve_order = verbose, True
    try:
        yield
    finally:
        context.enable_progress_bars, options.preserve_order = before
