"""Handling of Ctrl-C and SIGTERM during training: save a checkpoint, report what is saved and how to resume."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from raybge.training.checkpoint.manifest import checkpoint_name, latest_checkpoint
from raybge.training.health.run_state import RunStateLostError

if TYPE_CHECKING:
    from raybge.training.health.run_state import RunState

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM  # that of a program without a handler
WARN_SECONDS = 2.2  # `ray job stop` kills 3 s after SIGTERM; the loss has to be reported before that


class SignalHandler:
    """Context manager in which the first signal requests a graceful stop and the second ends the run at once.

    Only a program's main thread receives signals: in other threads, for example those of Ray Tune's trials, nothing
    changes. Neither does the handling of a signal that is ignored. When the run has stopped, the exception that the
    signal stands for is raised: KeyboardInterrupt or SystemExit(143).

    Args:
        run_state: state of the run.
        storage: folder or URI of the checkpoints.
        saves: whether the run saves checkpoints.
        log: called with a line for the user.
        resume_command: how to resume the run, shown to the user.
    """

    def __init__(self, run_state: RunState, storage: str, saves: bool, log: Callable[[str], None], resume_command: str):
        self.received: int | None = None  # number of the last signal
        self._first_at = 0.0
        self._stop_requested = self._warned = False
        self._previous_handlers: dict[int, Any] = {}
        self._run_state, self._storage, self._saves = run_state, storage, saves
        self._log, self._resume_command = log, resume_command

    def __enter__(self) -> SignalHandler:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous handlers; after an interruption, report what is saved and how to resume."""
        for number, handler in self._previous_handlers.items():
            if handler is not None:  # None: not installed by Python, which cannot restore it
                signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._log(f"{self._outcome()}; continue with:\n  {self._resume_command}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        repeated, self.received = self.received is not None, number
        if repeated:
            raise self.exception()
        self._first_at = time.monotonic()

    def exception(self) -> BaseException:
        """Return the exception that the received signal stands for."""
        return SystemExit(SIGTERM_EXIT_CODE) if self.received == signal.SIGTERM else KeyboardInterrupt()

    def raise_if_signaled(self) -> None:
        """Raise `exception()` if a signal was received. For use while no worker runs and there is nothing to save."""
        if self.received is not None:
            raise self.exception()

    def poll(self) -> None:
        """React to a received signal; call regularly. Raises `exception()` when the run has stopped."""
        if self.received is None:
            return
        progress = self._run_state.read()
        has_trained = progress.started_at is not None and progress.step > progress.started_at
        if progress.stopped_at is not None or not has_trained or not self._saves:
            raise self.exception()
        if not self._stop_requested:
            self._stop_requested = True
            self._run_state.request_stop()
            self._log("stopping: the current step is finished and saved; a second Ctrl-C ends the run at once")
        if time.monotonic() - self._first_at > WARN_SECONDS and not self._warned:
            self._warned = True
            self._log(f"not saved yet; if the run is killed now: {self._outcome()}")

    def _outcome(self) -> str:
        """Describe what is saved of a run that ends early."""
        checkpoint = latest_checkpoint(self._storage)
        name = checkpoint_name(checkpoint.path) if checkpoint else ""
        latest = f"the last complete checkpoint is {name}" if checkpoint else "there is no complete checkpoint"
        try:
            progress = self._run_state.read()
        except RunStateLostError:  # the node of the run state is shutting down
            return latest
        if progress.metrics:
            return "the run is finished, its model is saved"
        lost = max(0, progress.step - (checkpoint.step if checkpoint else 0))
        if checkpoint and not lost:
            return f"saved {name}"
        reason = "" if self._saves else "--save_strategy no: nothing is saved; "
        return f"{reason}{latest}, {lost:,} update{'s are' if lost != 1 else ' is'} lost"
