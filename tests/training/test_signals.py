"""Reaction of the driver to signals; real runs that receive one are in test_graceful_stop.py."""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from raybge.training import signals
from raybge.training.checkpoint.manifest import RunIdentity, commit_checkpoint
from raybge.training.health.run_state import Progress
from raybge.training.signals import SignalHandler

STOPPING = "stopping: the current step is finished and saved; a second Ctrl-C ends the run at once"


class FakeRunState(SimpleNamespace):
    """Run state with a given progress."""

    def __init__(self, **progress) -> None:
        super().__init__(progress=Progress(total=10, **progress), stop_requested=False)

    def read(self) -> Progress:
        return self.progress

    def request_stop(self) -> None:
        self.stop_requested = True


@pytest.fixture(autouse=True)
def sigint_enabled(request):
    """Enable Ctrl-C, which the background jobs of a shell ignore."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))


@pytest.fixture
def storage(tmp_path) -> Path:
    """Return a folder with checkpoint-4."""
    (tmp_path / "checkpoint-4").mkdir()
    commit_checkpoint(tmp_path / "checkpoint-4", 4, 0, 4, RunIdentity("", 1, 1, 1, ""))
    return tmp_path


def run(run_state: FakeRunState, storage: Path, numbers: list[int], lines: list[str], saves: bool = True) -> None:
    """Watch a run that receives these signals; `lines` collects the lines for the user."""
    with SignalHandler(run_state, storage, saves, lines.append, "AGAIN") as handler:
        for number in numbers:
            os.kill(os.getpid(), number)
        for _ in range(3):
            handler.poll()


def lines_of_run(error: type[BaseException], *args, **kwargs) -> list[str]:
    """Return the lines of a run that ends with this error."""
    lines: list[str] = []
    with pytest.raises(error):
        run(*args, lines, **kwargs)
    return lines


def test_first_signal_requests_a_stop(storage):
    run_state = FakeRunState(step=6, started_at=0)
    lines: list[str] = []
    run(run_state, storage, [signal.SIGINT], lines)
    assert run_state.stop_requested and lines == [STOPPING]


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_error_is_raised_after_the_workers_have_saved(storage, number, error):
    lines = lines_of_run(error, FakeRunState(step=4, started_at=0, stopped_at=4), storage, [number])
    assert lines == ["saved checkpoint-4; continue with:\n  AGAIN"]


def test_second_signal_ends_a_run_at_once(storage):
    run_state = FakeRunState(step=6, started_at=0)
    lines = lines_of_run(KeyboardInterrupt, run_state, storage, [signal.SIGINT, signal.SIGINT])
    assert lines == ["the last complete checkpoint is checkpoint-4, 2 updates are lost; continue with:\n  AGAIN"]


def test_run_without_checkpoints_reports_the_loss(tmp_path):
    run_state = FakeRunState(step=1, started_at=0)
    lines = lines_of_run(KeyboardInterrupt, run_state, tmp_path, [signal.SIGINT], saves=False)
    outcome = "--save_strategy no: nothing is saved; there is no complete checkpoint, 1 update is lost"
    assert lines == [f"{outcome}; continue with:\n  AGAIN"]


@pytest.mark.parametrize("started_at", [None, 4])
def test_workers_without_a_trained_step_are_not_asked_to_save(storage, started_at):
    run_state = FakeRunState(step=4, started_at=started_at)
    lines_of_run(KeyboardInterrupt, run_state, storage, [signal.SIGINT])
    assert not run_state.stop_requested


def test_loss_is_reported_before_a_job_is_killed(storage, monkeypatch):
    monkeypatch.setattr(signals, "WARN_SECONDS", 0)
    lines: list[str] = []
    run(FakeRunState(step=6, started_at=0), storage, [signal.SIGTERM], lines)
    outcome = "the last complete checkpoint is checkpoint-4, 2 updates are lost"
    assert lines[1:] == [f"not saved yet; if the run is killed now: {outcome}"]


def test_previous_handlers_are_restored(storage):
    previous = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with SignalHandler(FakeRunState(), storage, True, print, ""):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != previous
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == previous


def test_other_threads_install_no_handler(storage):
    """For example the thread of a Ray Tune trial."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            with SignalHandler(FakeRunState(), storage, True, print, "") as handler:
                time.sleep(0.01)
                handler.poll()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert not errors
