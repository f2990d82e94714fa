"""Lost runs: a killed worker, a full disk, Ctrl-C, a second start. With Ray what it has a part in, else without."""

import contextlib
import json
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import ray
from faulty_runs import UPDATES, assert_same_model, before_each_step, make_flags, to_argv
from process_runtime import use_processes

from raybge.train import finetune, main
from raybge.training.checkpoint.manifest import latest_checkpoint
from raybge.training.training_result import TrainingResult
from raybge.util.digest import fingerprint
from raybge.util.errors import UserError


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    return make_flags(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def evaluated(flags, tmp_path_factory) -> TrainingResult:
    """Return the result of an uninterrupted run with an evaluation every 2 updates; the other runs have none."""
    output = tmp_path_factory.mktemp("reference") / "out"
    evaluation = {"eval_data": flags["train_data"], "eval_strategy": "steps", "eval_steps": 2}
    with use_processes():
        return finetune(**flags, output_dir=str(output), **evaluation)


@pytest.fixture(scope="module")
def reference(evaluated) -> Path:
    """Return the output folder of the uninterrupted run."""
    return Path(evaluated.model)


def test_the_result_has_metrics_before_and_after(evaluated, reference):
    history = json.loads((reference / "trainer_state.json").read_text())["log_history"]
    means = [each["eval_nDCG@10"] for each in history if "eval_nDCG@10" in each]
    change = next(each for each in evaluated.changes if each.metric == "nDCG@10")
    assert (change.before, change.after) == pytest.approx((means[0], means[-1]), abs=1e-6)
    assert change.low <= change.after - change.before <= change.high
    assert evaluated.metrics["eval_nDCG@10"] == pytest.approx(change.after, abs=1e-6)
    assert evaluated.metrics["steps"] == UPDATES and Path(evaluated.report).is_file()
    assert all(isinstance(value, int | float) for value in evaluated.metrics.values())


def inject_fault(monkeypatch, rank: int, step: int, marker: Path | None, action: Callable[[], None]) -> None:
    """Call `action()` in worker `rank` before it trains update `step`; only once if there is a `marker` file."""

    def act(trainer, inputs) -> None:
        is_first = marker is None or not marker.exists()
        if trainer.stream.rank == rank and trainer.state.global_step == step and is_first:
            if marker:
                marker.touch()
            action()

    before_each_step(monkeypatch, act)


def die_after_checkpoint(storage: str, step: int) -> None:
    """Kill this process once the checkpoint of that update is complete: it may still be in publication."""
    while (checkpoint := latest_checkpoint(storage)) is None or checkpoint.step < step:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_disk() -> None:
    raise OSError(28, "No space left on device")


# --- a lost worker --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("storage", "with_ray"), [("{}/out", True), ("fsspec+file://{}/kept", False)])
def test_killed_worker_costs_the_steps_since_the_last_checkpoint(
    ray_cluster, flags, reference, tmp_path, monkeypatch, capfd, storage, with_ray
):
    """kill -9 in the second epoch, between two checkpoints; these are kept in a folder, or in a store.

    The reference was trained by plain processes: the weights do not depend on what starts the workers.
    """
    storage = storage.format(tmp_path)
    inject_fault(monkeypatch, 1, 5, tmp_path / "died", partial(die_after_checkpoint, storage, 4))
    output = tmp_path / "out"
    with nullcontext() if with_ray else use_processes():
        result = finetune(**flags, output_dir=str(output), storage_path=storage, max_failures=1)
    assert (tmp_path / "died").exists() and result.metrics["steps"] == UPDATES
    assert "continues from checkpoint-4, restart 1 of 1" in capfd.readouterr().err
    assert_same_model(output, reference)
    folder = Path(storage.removeprefix("fsspec+file://"))
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert not list(folder.glob(".raybge/writing-*"))
    assert not list(Path(tempfile.gettempdir()).glob(f"raybge-{fingerprint(storage)}-*"))


def test_full_disk_ends_the_run_and_a_second_start_resumes_it(
    worker_processes, flags, reference, tmp_path, monkeypatch, capfd
):
    """One worker raises while the other waits for it in a collective: the run ends nevertheless."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        inject_fault(patch, 0, 3, None, run_out_of_disk)
        start = time.monotonic()
        assert main(to_argv({**flags, "output_dir": output})) == 1
        assert time.monotonic() - start < 300  # ddp_timeout is 1,800
    message = capfd.readouterr().err
    assert "No space left on device" in message and "Traceback" not in message
    assert latest_checkpoint(output).step == 2 and not (output / "modules.json").exists()

    assert main(to_argv({**flags, "output_dir": output})) == 2  # the output folder is not empty
    assert "--resume" in capfd.readouterr().err
    other = {**flags, "global_batch_size": 4}
    assert main(to_argv({**other, "output_dir": output, "resume": True})) == 2
    assert "--global_batch_size is 4, but 6 in" in capfd.readouterr().err

    # The objective does not depend on the number of workers: without the flag, the batch size stays the same.
    del other["global_batch_size"]
    assert main(to_argv({**other, "output_dir": output, "resume": True})) == 0
    assert "continues from" in capfd.readouterr().out
    assert_same_model(output, reference)

    assert main(to_argv({**flags, "output_dir": output, "resume": True})) == 0
    assert "is finished" in capfd.readouterr().out


def test_missing_checkpoint_to_resume_from_is_reported(worker_processes, flags, tmp_path, capfd):
    finetune(**flags, output_dir=str(tmp_path / "out"), resume=True, dry_run=True)
    assert "nothing to continue" in capfd.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="there is no run in it"):
        finetune(**flags, output_dir=str(tmp_path / "other"), resume=True)
    with pytest.raises(UserError, match="overwrite_output_dir removes the run"):
        finetune(**flags, output_dir=str(tmp_path / "out"), resume=True, overwrite_output_dir=True)


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_kills_the_workers(ray_cluster, flags, tmp_path, monkeypatch, request):
    """The second Ctrl-C, after a hanging worker has not reacted to the first, on a Ray that outlives the command."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # the background jobs of a shell ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))
    started, ended = tmp_path / "started", threading.Event()

    def hang() -> None:
        started.write_text(str(os.getpid()))
        time.sleep(600)

    inject_fault(monkeypatch, 0, 1, None, hang)

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.1)
        for _ in range(2):
            if not ended.is_set():  # the first may have sufficed: another one would end the test process
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        finetune(**flags, output_dir=str(tmp_path / "out"))
    ended.set()
    limit = time.monotonic() + 60
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < limit:
            os.kill(int(started.read_text()), 0)
            time.sleep(0.1)
        pytest.fail("the worker is still running")
    assert ray.is_initialized()


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_ray_train_starts_no_unused_actors(ray_cluster, flags, tmp_path):
    before = ray._private.state.actors().keys()
    finetune(**flags, output_dir=str(tmp_path / "out"))
    actors = ray._private.state.actors().items()  # dead ones too
    started = {actor["ActorClassName"] for name, actor in actors if name not in before}
    assert "RayTrainWorker" in started
    assert not {name for name in started if re.search("DatasetManager|PreemptionWatcher|Cleaner", name)}, started


def test_metrics_before_and_after_training(reference):
    state = json.loads((reference / "trainer_state.json").read_text())
    ndcg = {e["step"]: e["eval_nDCG@10"] for e in state["log_history"] if "eval_nDCG@10" in e}
    assert set(ndcg) == {0, 2, 4, 6}
    assert json.loads((reference / "train_results.json").read_text())["eval_nDCG@10"] == ndcg[6]
    assert f"{ndcg[0]:.4f}" in (reference / "README.md").read_text()
