"""What the driver does with a signal; real runs that are sent one are in test_stopped.py."""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from raybge.training import signals as interruption
from raybge.training.checkpoint.manifest import Identity, seal
from raybge.training.health.run_state import Progress
from raybge.training.signals import Interruption


class Board(SimpleNamespace):
    """A board that says what it is given."""

    def __init__(self, **progress) -> None:
        super().__init__(progress=Progress(total=10, **progress), told=False)

    def read(self) -> Progress:
        return self.progress

    def stop(self) -> None:
        self.told = True


@pytest.fixture(autouse=True)
def interruptible(request):
    """A shell's background jobs ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))


@pytest.fixture
def storage(tmp_path) -> Path:
    """With checkpoint-4."""
    (tmp_path / "checkpoint-4").mkdir()
    seal(tmp_path / "checkpoint-4", 4, 0, 4, Identity("", 1, 1, 1, ""))
    return tmp_path


def run(board: Board, storage: Path, signals: list[int], said: list[str], saves: bool = True) -> None:
    """Watch a run to which these signals come; `said` gets the lines that are shown."""
    with Interruption(board, storage, saves, said.append, "AGAIN") as stop:
        for number in signals:
            os.kill(os.getpid(), number)
        for _ in range(3):
            stop.heed()


def shown(error: type[BaseException], *given, **more) -> list[str]:
    """The lines of a run that ends so."""
    said: list[str] = []
    with pytest.raises(error):
        run(*given, said, **more)
    return said


def test_the_first_signal_asks_the_workers_to_stop(storage):
    board = Board(step=6, begun=0)
    said: list[str] = []
    run(board, storage, [signal.SIGINT], said)
    assert board.told and said == ["stopping: this step is finished and saved; a second Ctrl-C ends at once"]


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_it_is_raised_once_they_have_saved(storage, number, error):
    said = shown(error, Board(step=4, begun=0, stopped=4), storage, [number])
    assert said == ["saved checkpoint-4; continue with: AGAIN"]


def test_the_second_signal_ends_a_run_at_once(storage):
    said = shown(KeyboardInterrupt, Board(step=6, begun=0), storage, [signal.SIGINT, signal.SIGINT])
    assert said == ["the last whole checkpoint is checkpoint-4, 2 updates are lost; continue with: AGAIN"]


def test_a_run_that_saves_nothing_says_so(tmp_path):
    said = shown(KeyboardInterrupt, Board(step=1, begun=0), tmp_path, [signal.SIGINT], saves=False)
    what = "--save_strategy no: nothing is saved; there is no whole checkpoint, 1 update is lost"
    assert said == [f"{what}; continue with: AGAIN"]


@pytest.mark.parametrize("begun", [None, 4])
def test_workers_that_have_trained_nothing_have_nothing_to_save(storage, begun):
    board = Board(step=4, begun=begun)
    shown(KeyboardInterrupt, board, storage, [signal.SIGINT])
    assert not board.told


def test_before_a_job_is_killed_it_says_what_that_costs(storage, monkeypatch):
    monkeypatch.setattr(interruption, "PATIENCE", 0)
    said: list[str] = []
    run(Board(step=6, begun=0), storage, [signal.SIGTERM], said)
    warning = "not saved yet; if the run were killed now: the last whole checkpoint is checkpoint-4, 2 updates are lost"
    assert said[1:] == [warning]


def test_signals_are_what_they_were_afterwards(storage):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interruption(Board(), storage, True, print, ""):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_other_threads_hear_nothing(storage):
    """As in a trial of a search."""
    errors: list[BaseException] = []

    def inside() -> None:
        try:
            with Interruption(Board(), storage, True, print, "") as stop:
                time.sleep(0.01)
                stop.heed()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert not errors
