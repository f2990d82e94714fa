"""Ctrl-C and SIGTERM while a run trains: what can be saved is saved, what was is said, and how to continue."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from raybge.training.checkpoint.manifest import name_of, newest

if TYPE_CHECKING:
    from raybge.training.health.run_state import Board

TERMINATED = 128 + signal.SIGTERM  # the exit code, as of a program that does not handle it
PATIENCE = 2.2  # seconds: `ray job stop` kills 3 after SIGTERM, and by then it must be said what is lost


class Interruption:
    """In the block the first signal has the workers stop and save; the second ends the run at once.

    Only a program's main thread hears signals: elsewhere, as in a trial of a search, and where one is ignored, nothing
    changes. At the end it raises what the signal stands for, KeyboardInterrupt or SystemExit(143).

    Args:
        board: where the workers of the run are.
        storage: where checkpoints lie, a folder or a URI.
        saves: whether there are any.
        say: shows a line to the person.
        again: how the run is continued.
    """

    def __init__(self, board: Board, storage: str, saves: bool, say: Callable[[str], None], again: str):
        self.heard: int | None = None
        self._since = 0.0
        self._told = self._warned = False
        self._before: dict[int, Any] = {}
        self._board, self._storage, self._saves, self._say, self._again = board, storage, saves, say, again

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._say(f"{self._outcome()}; continue with: {self._again}")

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again, self.heard = self.heard is not None, number
        if again:
            raise self.error()
        self._since = time.monotonic()

    def error(self) -> BaseException:
        """What the signal would have raised."""
        return SystemExit(TERMINATED) if self.heard == signal.SIGTERM else KeyboardInterrupt()

    def end(self) -> None:
        """Raises `error` where a signal was heard: called where nothing trains that could be saved."""
        if self.heard is not None:
            raise self.error()

    def heed(self) -> None:
        """Called now and then. Raises `error` when there is no more to wait for."""
        if self.heard is None:
            return
        progress = self._board.read()
        trained = progress.begun is not None and progress.step > progress.begun
        if progress.stopped is not None or not trained or not self._saves:
            raise self.error()
        if not self._told:
            self._told = True
            self._board.stop()
            self._say("stopping: this step is finished and saved; a second Ctrl-C ends at once")
        if time.monotonic() - self._since > PATIENCE and not self._warned:
            self._warned = True
            self._say(f"not saved yet; if the run were killed now: {self._outcome()}")

    def _outcome(self) -> str:
        """What is saved of a run that ends before its time."""
        import ray

        last = newest(self._storage)
        place = name_of(last.path) if last else ""
        try:
            progress = self._board.read()
        except ray.exceptions.RayError:  # its machine is going down
            return f"the last whole checkpoint is {place}" if last else "there is no whole checkpoint"
        if progress.metrics:
            return "the run is finished, its model is saved"
        lost = max(0, progress.step - (last.step if last else 0))
        if last and not lost:
            return f"saved {place}"
        why = "" if self._saves else "--save_strategy no: nothing is saved; "
        whole = f"the last whole checkpoint is {place}" if last else "there is no whole checkpoint"
        return f"{why}{whole}, {lost:,} update{'s are' if lost != 1 else ' is'} lost"
