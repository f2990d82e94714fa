"""Checkpoints whose writing is cut short, refused or slow: the one before stays what it was. Without a model."""

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
from faulty import URI, Died, Life, Store, mortal, stored

from raybge.training.checkpoint.manifest import RECORD, Identity, newest, path_of, seal
from raybge.training.checkpoint.writer import PART, CheckpointWriter, Publishing, Scratch
from raybge.util import retry
from raybge.util.errors import UserError
from raybge.util.filesystem import filesystem

SAME = Identity(data="d", global_batch=6, seed=1, gradient_accumulation_steps=1, order="o")


def files_of(step: int) -> dict[str, str]:
    return {"model.safetensors": f"weights {step}", "1_Pooling/config.json": f"{step}", "rng_state.pth": "random"}


def record(step: int, folder: Path) -> None:
    seal(folder, step, 0, step, SAME)


def begun(writer: CheckpointWriter, step: int, files: dict[str, str]) -> None:
    """As the Trainer does it: everything into the scratch."""
    writer.begin(step)
    for name, text in files.items():
        path = writer.scratch.folder / f"checkpoint-{step}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def save(storage: str, step: int, limit: int | None = 2, attempt: str = "a", files: dict | None = None) -> None:
    writer = CheckpointWriter(storage, Scratch(storage, attempt), 0, 0)
    begun(writer, step, files or files_of(step))
    writer.publish(Publishing(step, 0, 1, partial(record, step), limit, None))
    writer.finish()
    writer.close()


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def assert_loadable(folder: Path, step: int) -> None:
    found = contents(folder / f"checkpoint-{step}")
    assert found.pop(RECORD)
    assert found == files_of(step)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A node's temporary folder, and no waiting."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    monkeypatch.setattr(retry, "WAITS", (0, 0, 0))


# --- cut short ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_a_write_that_ends_at_any_byte_leaves_the_checkpoint_before(tmp_path, kind):
    """The process dies before each byte, name and sync in turn, until it has lived through all of them."""
    bytes_written = sum(map(len, files_of(6).values()))
    for step in (2, 4):
        save(str(tmp_path / "before"), step)
    for lived in range(100_000):
        root = tmp_path / str(lived)
        shutil.copytree(tmp_path / "before", root)
        storage = str(root) if kind == "folder" else URI
        life = Life(lived)
        died = False
        with stored(Store(root, life.spend), local=True), mortal(life):
            try:
                save(storage, 6)
            except Died:
                died = True
        with stored(Store(root)):
            step = newest(storage).step
            assert step == 6 or (died and step == 4), lived
            assert_loadable(root, step)
            assert_loadable(root, 4)
            save(storage, 6, attempt="b")  # the run goes on
            assert newest(storage).step == 6 and not (root / "checkpoint-2").exists()
            assert_loadable(root, 6)
        assert not any((tmp_path / "node").iterdir())
        assert not any((root / ".raybge").glob("*"))
        if not died:
            break
    assert lived > bytes_written + len(SAME.data)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_faults_checkpoints import files_of, save
for step in range(1, 10_000):
    save(sys.argv[1], step, limit=2, files=files_of(step) | {"optimizer.pt": str(step) * 300_000})
"""


@pytest.mark.parametrize("scheme", ["", "fsspec+file://"])
def test_a_process_that_is_killed_leaves_a_whole_checkpoint(tmp_path, scheme):
    """kill -9 at five moments; each time another process goes on."""
    moments = random.Random(0)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    last = 0
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, f"{scheme}{tmp_path}/kept", *paths])
        while process.poll() is None and _newest(f"{scheme}{tmp_path}/kept") in (0, last):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        last = _newest(f"{scheme}{tmp_path}/kept")
        found = contents(tmp_path / "kept" / f"checkpoint-{last}")
        assert found.pop("optimizer.pt") == str(last) * 300_000
        assert found.pop(RECORD) and found == files_of(last)


def _newest(storage: str) -> int:
    try:
        found = newest(storage)
    except UserError:  # removed between the look at it and its reading
        return 0
    return found.step if found else 0


# --- refused --------------------------------------------------------------------------------------------------------


def refusing(error: OSError, times: float, only: str = "") -> Callable[[str], None]:
    """Raise `error` so many times at each change of what holds `only`."""
    met: dict[str, int] = {}

    def before(what: str) -> None:
        if only in what and not what.startswith("write into"):
            met[what] = met.get(what, 0) + 1
            if met[what] <= times:
                raise error

    return before


def test_a_store_that_fails_now_and_then_is_asked_again(tmp_path, monkeypatch):
    """Each change is refused the first time; what is kept is as if none had been, and the tries are further apart."""
    waited: list[float] = []
    monkeypatch.setattr(retry, "WAITS", (1, 2, 4))
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=waited.append))
    with stored(Store(tmp_path, refusing(OSError(errno.EIO, "connection reset"), times=1))):
        for step in (2, 4, 6):
            save(URI, step)
        assert newest(URI).step == 6
    assert_loadable(tmp_path, 6)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert waited.count(1) >= 3 * (len(files_of(6)) + 1)  # each file and RECORD of three checkpoints
    assert waited.count(2) >= 3  # RECORD is written, then named


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EIO, "connection reset"), "connection reset"),
        (PermissionError(errno.EACCES, "access denied"), "access denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: free some room"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "store"])
def test_what_goes_on_failing_is_one_clear_error(tmp_path, monkeypatch, kind, error, says):
    """It names the place, and what is still there."""
    storage = str(tmp_path / "kept") if kind == "folder" else URI
    with stored(Store(tmp_path / "kept")):
        save(storage, 2)
        save(storage, 4)
    before = contents(tmp_path / "kept")
    if kind == "folder":
        monkeypatch.setattr("raybge.training.checkpoint.writer.os.rename", lambda *_: (_ for _ in ()).throw(error))
    with stored(Store(tmp_path / "kept", refusing(error, times=1000, only="checkpoint-6"))):
        with pytest.raises(UserError) as raised:
            save(storage, 6, limit=1)
        assert newest(storage).step == 4
    message = str(raised.value)
    assert message.startswith(f"the checkpoint {storage}/checkpoint-6 cannot be written") and "\n" not in message
    assert says in message and "checkpoint-4 is whole, --resume continues from it" in message
    left = contents(tmp_path / "kept")
    assert {name: text for name, text in left.items() if name in before} == before
    assert not any("checkpoint-6" in str(p) for p in (tmp_path / "node").rglob("*"))


def test_a_secret_of_the_store_is_not_said(tmp_path, monkeypatch):
    secret = "faulty://key:hush@store"
    store = Store(tmp_path, refusing(OSError(errno.EIO, f"no answer from {secret}"), times=1000))
    monkeypatch.setattr("faulty.URI", secret)
    with stored(store), pytest.raises(UserError) as raised:
        save(secret, 2)
    assert "hush" not in str(raised.value) and "faulty://…@store/checkpoint-2" in str(raised.value)


# --- in the background ----------------------------------------------------------------------------------------------


def test_older_checkpoints_go_when_the_new_one_is_whole(tmp_path):
    """And not before: each removal finds a RECORD in the newest."""
    seen = []

    def before(what: str) -> None:
        if what.startswith("remove"):
            seen.append((tmp_path / f"checkpoint-{step}" / RECORD).is_file())

    with stored(Store(tmp_path, before)):
        for step in range(1, 6):
            save(URI, step, limit=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert seen and all(seen)


def test_saving_waits_only_where_it_is_asked_to(tmp_path):
    """A store that hangs holds nobody; a limit of time is kept."""
    free = threading.Event()
    with stored(Store(tmp_path, lambda what: free.wait() and None)):
        writer = CheckpointWriter(URI, Scratch(URI, "a"), 0, 0)
        begun(writer, 2, files_of(2))
        start = time.monotonic()
        writer.publish(Publishing(2, 0, 1, partial(record, 2), None, None))
        assert not writer.finish(0.05) and time.monotonic() - start < 5
        assert newest(URI) is None
        free.set()
        assert writer.finish() and newest(URI).step == 2


def test_a_checkpoint_of_two_nodes_is_whole_when_both_have_published(tmp_path, monkeypatch):
    """Each has files of its own; worker 0 waits for the other's note, and leaves none."""
    looked = threading.Event()
    monkeypatch.setattr("raybge.training.checkpoint.writer.time", SimpleNamespace(sleep=lambda _: looked.set()))
    with stored(Store(tmp_path / "kept")):
        writers = []
        for node in (0, 1):
            scratch = Scratch(URI, "a")
            scratch.folder = tmp_path / f"node-{node}"
            writers.append(CheckpointWriter(URI, scratch, rank=2 * node, local_rank=0))
        begun(writers[0], 2, files_of(2) | {"shard_0": "0"})
        begun(writers[1], 2, {"shard_1": "1"})
        writers[0].publish(Publishing(2, 0, 2, partial(record, 2), None, None))
        assert looked.wait(20) and not writers[0].finish(0) and newest(URI) is None
        writers[1].publish(Publishing(2, 1, 2, partial(record, 2), None, None))
        assert writers[1].finish() and writers[0].finish() and newest(URI).step == 2
    found = contents(tmp_path / "kept" / "checkpoint-2")
    assert found.pop(RECORD) and found == files_of(2) | {"shard_0": "0", "shard_1": "1"}
    assert not any(name.startswith(PART) for name in found)


def test_only_one_worker_of_a_node_publishes(tmp_path):
    """Into a folder that the nodes share, only worker 0 does."""

    def publishes(storage: str) -> list[bool]:
        ranks = [(0, 0), (1, 1), (2, 0), (3, 1)]  # two nodes of two workers
        return [CheckpointWriter(storage, Scratch(storage, "a"), *each).publishes for each in ranks]

    assert publishes(str(tmp_path)) == [True, False, False, False]
    with stored(Store(tmp_path)):
        assert publishes(URI) == [True, False, True, False]


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_node_fetches_a_checkpoint_once(tmp_path, monkeypatch):
    """However many workers it has, and again where it was cut short. A folder is read where it lies."""
    uri = f"fsspec+file://{tmp_path}/kept"
    save(uri, 2)
    store, place = filesystem(path_of(uri, 2))
    assert store.get_file_info(place).type.name == "Directory"
    read: list[Any] = []

    class Reading(Store):
        def open_input_stream(self, path):
            read.append(path)
            if len(read) == 2:
                raise OSError(errno.EIO, "connection reset")
            return super().open_input_stream(path)

    with stored(Reading(tmp_path / "kept")):
        found: list[str] = []
        scratches = [Scratch(URI, "a") for _ in range(3)]
        threads = [threading.Thread(target=lambda s=s: found.append(s.fetched(path_of(URI, 2)))) for s in scratches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 1 and len(found) == 3
        assert_loadable(Path(found[0]).parent, 2)
        assert len(read) <= 2 * (len(files_of(2)) + 1)
        scratches[0].remove()
        assert Scratch(str(tmp_path), "a").fetched(str(tmp_path / "kept")) == str(tmp_path / "kept")
    assert not any((tmp_path / "node").iterdir())
