"""Runs that are lost: a killed worker, a full disk, Ctrl-C, a second start. Real Ray Train workers."""

import contextlib
import json
import os
import re
import signal
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import ray
from disturbed import LAST, argv, assert_same_model, before_each_step, make_flags, start_ray

from raybge.train import finetune, main
from raybge.training.checkpoint.manifest import digest, newest
from raybge.util.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def cluster():
    start_ray(__name__)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    return make_flags(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory) -> Path:
    """A run that is measured every 2 updates, as those that are compared with it are not."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    finetune(**flags, output_dir=str(output), eval_data=flags["train_data"], eval_strategy="steps", eval_steps=2)
    return output


def fault(monkeypatch, rank: int, step: int, once: Path | None, act) -> None:
    """Have `act()` run in worker `rank` before it trains update `step`; once, where `once` is a file to remember by."""

    def when_due(trainer, inputs) -> None:
        first = once is None or not once.exists()
        if trainer.stream.rank == rank and trainer.state.global_step == step and first:
            if once:
                once.touch()
            act()

    before_each_step(monkeypatch, when_due)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_behind(storage: str, step: int) -> None:
    """Once the checkpoint of that update is whole: it may be on its way."""
    while (found := newest(storage)) is None or found.step < step:
        time.sleep(0.02)
    die()


def run_out_of_disk() -> None:
    raise OSError(28, "No space left on device")


# --- a lost worker --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["{}/out", "fsspec+file://{}/kept"])
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(
    flags, undisturbed, tmp_path, monkeypatch, capfd, storage
):
    """kill -9 in the second epoch, in the middle between two checkpoints; they lie in a folder, or a store."""
    storage = storage.format(tmp_path)
    fault(monkeypatch, rank=1, step=5, once=tmp_path / "died", act=partial(die_behind, storage, 4))
    output = tmp_path / "out"
    metrics = finetune(**flags, output_dir=str(output), storage_path=storage, max_failures=1)
    assert (tmp_path / "died").exists() and metrics["steps"] == LAST
    assert "continues from checkpoint-4, restart 1 of 1" in capfd.readouterr().err
    assert_same_model(output, undisturbed)
    folder = Path(storage.removeprefix("fsspec+file://"))
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert not list(folder.glob(".raybge/writing-*"))
    assert not list(Path(tempfile.gettempdir()).glob(f"raybge-{digest(storage)}-*"))


def test_a_full_disk_ends_the_run_and_a_second_start_continues_it(flags, undisturbed, tmp_path, monkeypatch, capfd):
    """One worker raises while the other waits for it in a collective: nobody waits for ever."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        fault(patch, rank=0, step=3, once=None, act=run_out_of_disk)
        start = time.monotonic()
        assert main(argv({**flags, "output_dir": output})) == 1
        assert time.monotonic() - start < 300  # ddp_timeout is 1,800
    message = capfd.readouterr().err
    assert "No space left on device" in message and "Traceback" not in message
    assert newest(output).step == 2 and not (output / "modules.json").exists()

    assert main(argv({**flags, "output_dir": output})) == 2  # an output folder with something in it
    assert "--resume" in capfd.readouterr().err
    other = {**flags, "global_batch_size": 4}
    assert main(argv({**other, "output_dir": output, "resume": True})) == 2
    assert "--global_batch_size is 4, but 6 in" in capfd.readouterr().err

    # The workers' number is another thing than the objective: without the flag, the batch stays what it was.
    del other["global_batch_size"]
    assert main(argv({**other, "output_dir": output, "resume": True})) == 0
    assert "continues from" in capfd.readouterr().out
    assert_same_model(output, undisturbed)

    assert main(argv({**flags, "output_dir": output, "resume": True})) == 0
    assert "is finished" in capfd.readouterr().out


def test_nothing_to_continue_is_said(flags, tmp_path, capfd):
    finetune(**flags, output_dir=str(tmp_path / "out"), resume=True, dry_run=True)
    assert "nothing to continue" in capfd.readouterr().out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    with pytest.raises(UserError, match="there is no run in it"):
        finetune(**flags, output_dir=str(tmp_path / "mine"), resume=True)
    with pytest.raises(UserError, match="--overwrite_output_dir removes the run"):
        finetune(**flags, output_dir=str(tmp_path / "out"), resume=True, overwrite_output_dir=True)


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_workers_too(flags, tmp_path, monkeypatch, request):
    """A second one, where a worker hangs and the first is not heard; also where Ray goes on after the command."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    started = tmp_path / "started"

    def hang() -> None:
        started.write_text(str(os.getpid()))
        time.sleep(600)

    fault(monkeypatch, rank=0, step=1, once=None, act=hang)

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.1)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        finetune(**flags, output_dir=str(tmp_path / "out"))
    limit = time.monotonic() + 60
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < limit:
            os.kill(int(started.read_text()), 0)
            time.sleep(0.1)
        pytest.fail("the worker goes on")
    assert ray.is_initialized()


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_ray_train_starts_no_actor_that_a_run_has_no_use_for(undisturbed):
    started = {actor["ActorClassName"] for actor in ray._private.state.actors().values()}  # dead ones too
    assert "RayTrainWorker" in started
    assert not {name for name in started if re.search("DatasetManager|PreemptionWatcher|Cleaner", name)}, started


def test_metrics_before_and_after(undisturbed):
    state = json.loads((undisturbed / "trainer_state.json").read_text())
    measured = {e["step"]: e["eval_nDCG@10"] for e in state["log_history"] if "eval_nDCG@10" in e}
    assert set(measured) == {0, 2, 4, 6}
    assert json.loads((undisturbed / "train_results.json").read_text())["eval_nDCG@10"] == measured[6]
    assert f"{measured[0]:.4f}" in (undisturbed / "README.md").read_text()
