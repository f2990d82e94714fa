"""Checkpoints whose writing is interrupted, refused or slow: the previous one stays intact. Without a model."""

import errno
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faulty_storage import URI, FaultyStore, Lifetime, ProcessDied, limit_lifetime, limit_local_changes, use_store

from raybge.training.checkpoint.manifest import (
    MANIFEST,
    RunIdentity,
    checkpoint_path,
    commit_checkpoint,
    latest_checkpoint,
)
from raybge.training.checkpoint.writer import MARKER, CheckpointWriter, PublishRequest, StagingFolder
from raybge.util import retry
from raybge.util.errors import UserError
from raybge.util.filesystem import filesystem

IDENTITY = RunIdentity(data="d", global_batch=6, seed=1, gradient_accumulation_steps=1, order="o")


def files_of(step: int) -> dict[str, str]:
    return {"model.safetensors": f"weights {step}", "1_Pooling/config.json": f"{step}", "rng_state.pth": "random"}


def commit(step: int, folder: Path) -> None:
    commit_checkpoint(folder, step, 0, step, IDENTITY)


def stage(writer: CheckpointWriter, step: int, files: dict[str, str]) -> None:
    """Write files into the staging folder, as the Trainer does."""
    writer.prepare(step)
    for name, text in files.items():
        path = writer.staging.folder / f"checkpoint-{step}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def save(storage: str, step: int, limit: int | None = 2, attempt: str = "a", files: dict | None = None) -> None:
    writer = CheckpointWriter(storage, StagingFolder(storage, attempt), 0, 0)
    stage(writer, step, files or files_of(step))
    writer.publish(PublishRequest(step, 0, 1, partial(commit, step), limit, ()))
    writer.wait()
    writer.close()


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def assert_loadable(folder: Path, step: int) -> None:
    files = contents(folder / f"checkpoint-{step}")
    assert files.pop(MANIFEST)
    assert files == files_of(step)


@pytest.fixture(autouse=True)
def node(tmp_path, monkeypatch):
    """Set the node's temporary folder, and retry without waiting."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    monkeypatch.setattr(retry, "WAITS", (0, 0, 0))


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_write_that_is_interrupted_at_any_byte_keeps_the_previous_checkpoint(tmp_path, kind):
    """The process dies before each byte, rename and sync in turn, until it survives all of them."""
    bytes_written = sum(map(len, files_of(6).values()))
    for step in (2, 4):
        save(str(tmp_path / "before"), step)
    for actions in range(100_000):
        root = tmp_path / str(actions)
        shutil.copytree(tmp_path / "before", root)
        storage = str(root) if kind == "folder" else URI
        lifetime = Lifetime(actions)
        died = False
        use_store(root, lifetime.spend)
        with limit_local_changes(lifetime), limit_lifetime(lifetime):
            try:
                save(storage, 6)
            except ProcessDied:
                died = True
        use_store(root)
        step = latest_checkpoint(storage).step
        assert step == 6 or (died and step == 4), actions
        assert_loadable(root, step)
        assert_loadable(root, 4)
        save(storage, 6, attempt="b")  # the resumed run
        assert latest_checkpoint(storage).step == 6 and not (root / "checkpoint-2").exists()
        assert_loadable(root, 6)
        assert not any((tmp_path / "node").iterdir())
        assert not any((root / ".raybge").glob("*"))
        if not died:
            break
    assert actions > bytes_written + len(IDENTITY.data)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_faults_checkpoints import files_of, save
for step in range(1, 10_000):
    save(sys.argv[1], step, limit=2, files=files_of(step) | {"optimizer.pt": str(step) * 300_000})
"""


@pytest.mark.parametrize("scheme", ["", "fsspec+file://"])
def test_killed_process_leaves_a_complete_checkpoint(tmp_path, scheme):
    """kill -9 at five random times, each followed by a new process."""
    rng = random.Random(0)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    last = 0
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, f"{scheme}{tmp_path}/kept", *paths])
        while process.poll() is None and _latest_step(f"{scheme}{tmp_path}/kept") in (0, last):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        last = _latest_step(f"{scheme}{tmp_path}/kept")
        files = contents(tmp_path / "kept" / f"checkpoint-{last}")
        assert files.pop("optimizer.pt") == str(last) * 300_000
        assert files.pop(MANIFEST) and files == files_of(last)


def _latest_step(storage: str) -> int:
    try:
        checkpoint = latest_checkpoint(storage)
    except UserError:  # deleted between listing and reading it
        return 0
    return checkpoint.step if checkpoint else 0


# --- refused --------------------------------------------------------------------------------------------------------


def refuse(error: OSError, times: float, only: str = "") -> Callable[[str], None]:
    """Return a function that raises `error` the first `times` times at each action that contains `only`."""
    counts: dict[str, int] = {}

    def before(action: str) -> None:
        if only in action and not action.startswith("write into"):
            counts[action] = counts.get(action, 0) + 1
            if counts[action] <= times:
                raise error

    return before


def test_temporary_errors_are_retried(tmp_path, monkeypatch):
    """Each change is refused the first time; the checkpoints are complete, and the waits between tries grow."""
    waits: list[float] = []
    monkeypatch.setattr(retry, "WAITS", (1, 2, 4))
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=waits.append))
    use_store(tmp_path, refuse(OSError(errno.EIO, "connection reset"), times=1))
    for step in (2, 4, 6):
        save(URI, step)
    assert latest_checkpoint(URI).step == 6
    assert_loadable(tmp_path, 6)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert waits.count(1) >= 3 * (len(files_of(6)) + 1)  # each file and manifest of three checkpoints
    assert waits.count(2) >= 3  # the manifest is written, then renamed


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EIO, "connection reset"), "connection reset"),
        (PermissionError(errno.EACCES, "access denied"), "access denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: free some space"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "store"])
def test_lasting_errors_become_one_message(tmp_path, monkeypatch, kind, error, message):
    """It names the storage, and the checkpoint that is intact."""
    storage = str(tmp_path / "kept") if kind == "folder" else URI
    use_store(tmp_path / "kept")
    save(storage, 2)
    save(storage, 4)
    before = contents(tmp_path / "kept")
    if kind == "folder":
        monkeypatch.setattr("raybge.training.checkpoint.writer.os.rename", lambda *_: (_ for _ in ()).throw(error))
    use_store(tmp_path / "kept", refuse(error, times=1000, only="checkpoint-6"))
    with pytest.raises(UserError) as raised:
        save(storage, 6, limit=1)
    assert latest_checkpoint(storage).step == 4
    actual = str(raised.value)
    assert actual.startswith(f"the checkpoint {storage}/checkpoint-6 cannot be written") and "\n" not in actual
    assert message in actual and "checkpoint-4 is complete, --resume continues from it" in actual
    after = contents(tmp_path / "kept")
    assert {name: text for name, text in after.items() if name in before} == before
    assert not any("checkpoint-6" in str(p) for p in (tmp_path / "node").rglob("*"))


def test_secret_in_a_uri_is_redacted(tmp_path):
    secret = "faulty://key:hush@store"
    use_store(tmp_path, refuse(OSError(errno.EIO, f"no answer from {secret}"), times=1000))
    with pytest.raises(UserError) as raised:
        save(secret, 2)
    assert "hush" not in str(raised.value) and "faulty://…@store/checkpoint-2" in str(raised.value)


# --- in the background ----------------------------------------------------------------------------------------------


def test_older_checkpoints_are_deleted_when_the_new_one_is_complete(tmp_path):
    """And not before: at each deletion the latest checkpoint has a manifest."""
    complete = []

    def before(action: str) -> None:
        if action.startswith("remove"):
            complete.append((tmp_path / f"checkpoint-{step}" / MANIFEST).is_file())

    use_store(tmp_path, before)
    for step in range(1, 6):
        save(URI, step, limit=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert complete and all(complete)


def test_publication_does_not_block(tmp_path):
    """A store that hangs blocks neither `publish` nor a wait with a timeout."""
    released = threading.Event()
    use_store(tmp_path, lambda action: released.wait() and None)
    writer = CheckpointWriter(URI, StagingFolder(URI, "a"), 0, 0)
    stage(writer, 2, files_of(2))
    start = time.monotonic()
    writer.publish(PublishRequest(2, 0, 1, partial(commit, 2), None, ()))
    assert not writer.wait(0.05) and time.monotonic() - start < 5
    assert latest_checkpoint(URI) is None
    released.set()
    assert writer.wait() and latest_checkpoint(URI).step == 2


@pytest.mark.parametrize(("is_store", "part"), [(False, 0), (True, 0), (True, 1)], ids=["folder", "store", "node 2"])
def test_checkpoint_is_not_published_while_its_files_are_deleted(tmp_path, monkeypatch, is_store, part):
    """Another attempt deletes the staging folder while a thread of this one is about to publish what is in it."""
    use_store(tmp_path / "kept")
    storage = URI if is_store else str(tmp_path / "kept")
    writer = CheckpointWriter(storage, StagingFolder(storage, "a"), 0, 0)
    stage(writer, 2, files_of(2))
    deleting, delete = threading.Event(), shutil.rmtree

    def delete_slowly(folder: Path, **flags: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for weights in Path(folder).rglob("model.safetensors"):
                weights.unlink()
            deleting.set()
            with pytest.raises((UserError, OSError)):
                writer.wait()
        delete(folder, **flags)

    monkeypatch.setattr(shutil, "rmtree", delete_slowly)
    publish = writer._publish
    monkeypatch.setattr(writer, "_publish", lambda request: deleting.wait() and publish(request))
    writer.publish(PublishRequest(2, part, 1 + part, partial(commit, 2), None, ()))
    StagingFolder(storage, "b")
    assert latest_checkpoint(storage) is None
    assert not (tmp_path / "kept" / "checkpoint-2" / f"{MARKER}{part}").exists()


def test_checkpoint_of_two_nodes_is_complete_when_both_have_published(tmp_path, monkeypatch):
    """Each node has its own files; worker 0 waits for the other node's upload marker, and deletes it."""
    polled = threading.Event()
    monkeypatch.setattr("raybge.training.checkpoint.writer.time", SimpleNamespace(sleep=lambda _: polled.set()))
    use_store(tmp_path / "kept")
    writers = []
    for node in (0, 1):
        staging = StagingFolder(URI, "a")
        staging.folder = tmp_path / f"node-{node}"
        writers.append(CheckpointWriter(URI, staging, rank=2 * node, local_rank=0))
    stage(writers[0], 2, files_of(2) | {"shard_0": "0"})
    stage(writers[1], 2, {"shard_1": "1"})
    writers[0].publish(PublishRequest(2, 0, 2, partial(commit, 2), None, ()))
    assert polled.wait(20) and not writers[0].wait(0) and latest_checkpoint(URI) is None
    writers[1].publish(PublishRequest(2, 1, 2, partial(commit, 2), None, ()))
    assert writers[1].wait() and writers[0].wait() and latest_checkpoint(URI).step == 2
    files = contents(tmp_path / "kept" / "checkpoint-2")
    assert files.pop(MANIFEST) and files == files_of(2) | {"shard_0": "0", "shard_1": "1"}
    assert not any(name.startswith(MARKER) for name in files)


def test_one_worker_per_node_publishes(tmp_path):
    """Into a folder that the nodes share, only worker 0 publishes."""

    def publishers(storage: str) -> list[bool]:
        ranks = [(0, 0), (1, 1), (2, 0), (3, 1)]  # two nodes of two workers
        return [CheckpointWriter(storage, StagingFolder(storage, "a"), *each).is_publisher for each in ranks]

    assert publishers(str(tmp_path)) == [True, False, False, False]
    use_store(tmp_path)
    assert publishers(URI) == [True, False, True, False]


# --- reading --------------------------------------------------------------------------------------------------------


def test_node_fetches_a_checkpoint_once(tmp_path, monkeypatch):
    """For any number of workers, and with retries. A checkpoint in a folder is not copied."""
    uri = f"fsspec+file://{tmp_path}/kept"
    save(uri, 2)
    store, inner_path = filesystem(checkpoint_path(uri, 2))
    assert store.get_file_info(inner_path).type.name == "Directory"
    opened: list[Any] = []

    class FaultyReads(FaultyStore):
        def _open(self, path, mode="rb", *args, **kwargs):
            if mode == "rb":
                opened.append(path)
                if len(opened) == 2:
                    raise OSError(errno.EIO, "connection reset")
            return super()._open(path, mode, *args, **kwargs)

    use_store(tmp_path / "kept", kind=FaultyReads)
    folders: list[str] = []
    stagings = [StagingFolder(URI, "a") for _ in range(3)]
    threads = [threading.Thread(target=lambda s=s: folders.append(s.fetch(checkpoint_path(URI, 2)))) for s in stagings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and len(folders) == 3
    assert_loadable(Path(folders[0]).parent, 2)
    assert len(opened) <= 2 * (len(files_of(2)) + 1)
    stagings[0].delete()
    assert StagingFolder(str(tmp_path), "a").fetch(str(tmp_path / "kept")) == str(tmp_path / "kept")
    assert not any((tmp_path / "node").iterdir())
