"""A Ray that a Python function starts stays for the next call, under the same settings."""

import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import psutil
import pytest
import ray
import ray.data

from raybge.cluster import connection
from raybge.cluster.connection import connect
from raybge.util.errors import UserError


class FakeRay:
    """Ray's functions that start and stop it; counts the starts."""

    def __init__(self) -> None:
        self.starts, self.running = 0, False

    def init(self, **options) -> None:
        assert not self.running
        self.starts, self.running = self.starts + 1, True

    def shutdown(self) -> None:
        self.running = False

    def is_initialized(self) -> bool:
        return self.running

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(gcs_address=f"127.0.0.1:{self.starts}")


@pytest.fixture
def fake(monkeypatch) -> FakeRay:
    fake = FakeRay()
    for name in ("init", "shutdown", "is_initialized", "get_runtime_context"):
        monkeypatch.setattr(ray, name, getattr(fake, name))
    monkeypatch.setattr(connection, "read_cluster", lambda own: own)
    monkeypatch.setattr(connection, "_live_head", lambda: None)
    monkeypatch.setattr(connection, "_own", None)
    return fake


def test_the_next_call_uses_the_same_ray(fake):
    for _ in range(3):
        with connect(messages=False, keep=True) as own:
            assert own
            with connect(messages=False) as inner:  # of a command inside of a command
                assert inner
        assert fake.running
    assert fake.starts == 1
    with connect(messages=False):  # the last one that needs it
        assert fake.starts == 1
    assert not fake.running


@pytest.mark.parametrize("change", ["variable", "folder", "output"])
def test_other_settings_start_another_ray(fake, change, monkeypatch, tmp_path):
    """Ray's processes inherit variables, folder and output when they start."""
    with connect(messages=False, keep=True):
        pass
    if change == "variable":
        monkeypatch.setenv("HF_TOKEN", "another")
    if change == "folder":
        monkeypatch.chdir(tmp_path)
    with connect(messages=change == "output", keep=True) as own:
        assert own and fake.starts == 2


def test_another_cluster_is_joined_in_its_place(fake, monkeypatch):
    with connect(keep=True):
        pass
    monkeypatch.setattr(connection, "_answers", lambda address: True)
    with connect("10.0.0.1:6379", keep=True) as own:
        assert not own and fake.starts == 2
    assert not fake.running


def test_nothing_is_kept_after_an_error_or_by_a_command(fake):
    with pytest.raises(UserError), connect(keep=True):
        raise UserError("a row")
    assert not fake.running
    with connect():
        pass
    assert not fake.running


def test_nothing_is_kept_outside_of_the_main_thread(fake):
    def call() -> None:
        with connect(keep=True):
            assert fake.running

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert fake.starts == 1 and not fake.running


def test_the_program_may_stop_it_and_start_its_own(fake):
    with connect(keep=True):
        pass
    ray.shutdown()
    ray.init()
    with connect(keep=True) as own:
        assert not own
    assert fake.running and fake.starts == 2


@pytest.mark.alone  # starts a Ray of its own
def test_ray_ends_with_the_process(tiny_model, tmp_path):
    """Two calls of a program use one Ray, of which nothing is left when the program has ended."""
    (tmp_path / "rows.jsonl").write_text('{"text": "ak bl"}\n{"text": "cm"}\n')
    code = f"""
        import psutil, ray, raybge
        for i in range(2):
            raybge.encode_dataset(
                model_name_or_path={tiny_model!r}, input_file="rows.jsonl", output_file=f"{{i}}.npy", num_workers=1
            )
            print(ray.get_runtime_context().gcs_address, *(each.pid for each in psutil.Process().children(True)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (first, *old), (second, *new) = (line.split() for line in done.stdout.splitlines() if line.startswith("127.0.0.1:"))
    assert first == second and (tmp_path / "0.npy").read_bytes() == (tmp_path / "1.npy").read_bytes()
    processes = [psutil.Process(pid) for pid in map(int, {*old, *new}) if psutil.pid_exists(pid)]
    assert len(new) > 2 and not psutil.wait_procs(processes, timeout=30)[1]
