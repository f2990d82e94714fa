"""How a checkpoint comes to where checkpoints are kept: written on the node, then published while training goes on.

Workers write into a folder of their node, `Scratch`. Where checkpoints lie in a folder that the nodes share, so does
the scratch: worker 0 brings it onto the disk and gives it its name, and a checkpoint is there as a whole or not at all.
To an object store, one worker of each node uploads what that node has written and leaves a note; worker 0 waits for the
notes, and RECORD goes up last. No collective runs beside the training's own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import posixpath
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.fs as pafs

from raybge.training.checkpoint.manifest import RECORD, digest, discard, name_of, newest, path_of, rotate, sync
from raybge.util.errors import UserError
from raybge.util.filesystem import HIDDEN, filesystem, is_local
from raybge.util.retry import Result, retried

PART = ".part-"  # and a number: the note of a node that its files are there
POLL_SECONDS = 0.5  # between looks for notes
LINGER_SECONDS = 30  # for what is being published when training ends with an error


class Scratch:
    """A folder for checkpoints on their way, shared by the workers of a node.

    Args:
        storage: where checkpoints lie, a folder or a URI.
        attempt: a name that this start of the workers has alone. What other starts left on this node is removed.
    """

    def __init__(self, storage: str, attempt: str):
        if is_local(storage, "--storage_path"):  # on the same file system: moving a folder is renaming it
            parent, prefix = Path(filesystem(storage)[1], HIDDEN), "writing-"
        else:
            parent, prefix = Path(tempfile.gettempdir()), f"raybge-{digest(storage)}-"
        self.folder = parent / f"{prefix}{attempt}"
        for other in parent.glob(f"{prefix}*"):
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)

    def make(self) -> None:
        # In a folder that all users write into, the name is one that cannot be guessed.
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def fetched(self, path: str) -> str:
        """The folder of a checkpoint; of one in a store a copy on this node, which its workers make once."""
        store, place = filesystem(path)
        if isinstance(store, pafs.LocalFileSystem):
            return place
        self.make()
        target = self.folder / "fetched" / name_of(path)
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                aside = str(target) + ".part"
                os.makedirs(aside, exist_ok=True)
                says = f"{path} cannot be read into {aside}"
                retried(lambda: pafs.copy_files(place, aside, store, pafs.LocalFileSystem()), says)
                os.rename(aside, target)
        return str(target)

    def forget(self) -> None:
        """Every worker of the node has read what was fetched."""
        shutil.rmtree(self.folder / "fetched", ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Publishing:
    """One checkpoint on its way.

    Args:
        step: the updates that are done.
        part: which of the `parts` that make it this worker publishes; with part 0, it says that the whole is there.
        seal: writes RECORD into the folder it is given; None for a model without what a run needs to continue.
        limit: checkpoints to keep.
        best: one to keep beside them.
    """

    step: int
    part: int
    parts: int
    seal: Callable[[Path], None] | None
    limit: int | None
    best: str | None


class CheckpointWriter:
    """Publishes a run's checkpoints from this worker, one after the other, in a thread.

    Args:
        storage: where checkpoints lie, a folder or a URI.
        scratch: where the workers of this node write them.
        rank: the worker's number.
        local_rank: its number on its node.
    """

    def __init__(self, storage: str, scratch: Scratch, rank: int, local_rank: int):
        self.storage = storage
        self.scratch = scratch
        self.leads = rank == 0
        self.shared = is_local(storage, "--storage_path")
        self.publishes = self.leads if self.shared else local_rank == 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, step: int) -> None:
        """Make room for a checkpoint that is now written into `scratch`. The one before must be published."""
        if self.publishes:
            self.scratch.forget()
        self.scratch.make()
        if self.leads:  # half of one, from a run that was stopped here
            path = path_of(self.storage, step)
            retried(lambda: discard(path), f"{path} cannot be written")

    def write(self, step: int, action: Callable[[], None]) -> None:
        """Do what writes a part of the checkpoint into `scratch`, again where the disk refuses."""
        self._retried(step, action)

    def publish(self, what: Publishing) -> None:
        """Begin to publish what is in `scratch`: all of it is written."""
        self._thread = threading.Thread(target=self._guarded, args=(what,), daemon=True, name="checkpoint")
        self._thread.start()

    def finish(self, timeout: float | None = None) -> bool:
        """Wait, at most `timeout` seconds, until it is published; False where it is not yet. Raises what stopped it."""
        if self._thread:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise error
        return True

    def close(self) -> None:
        """Leave nothing behind on this node. What is being published gets some seconds."""
        if self.publishes:
            with contextlib.suppress(Exception):
                self.finish(LINGER_SECONDS)
            self.scratch.remove()

    def _guarded(self, what: Publishing) -> None:
        try:
            self._publish(what)
        except BaseException as error:  # raised where the training thread next asks
            self._error = error

    def _publish(self, what: Publishing) -> None:
        path = path_of(self.storage, what.step)
        written = self.scratch.folder / name_of(path)
        if what.seal and not what.part:
            seal = what.seal
            self._retried(what.step, lambda: seal(written))
        if self.shared:
            self._retried(what.step, lambda: _move(written, Path(path)))
        else:
            self._upload(what, written, path)
        if not what.part:
            self._retried(what.step, lambda: rotate(path, what.limit, what.best))  # only now: they were what there was

    def _upload(self, what: Publishing, written: Path, path: str) -> None:
        for file in sorted(each for each in written.rglob("*") if each.is_file() and each.name != RECORD):
            name = file.relative_to(written).as_posix()
            self._retried(what.step, partial(_put, file, path, name))
        if what.part:
            self._retried(what.step, lambda: _note(path, what.part))
        else:
            while not self._retried(what.step, lambda: _all_noted(path, what.parts)):
                time.sleep(POLL_SECONDS)
            if what.seal:
                self._retried(what.step, lambda: _put(written / RECORD, path, RECORD))
            self._retried(what.step, lambda: _remove_notes(path, what.parts))
        shutil.rmtree(written)

    def _retried(self, step: int, action: Callable[[], Result]) -> Result:
        path = path_of(self.storage, step)
        try:
            return retried(action, f"the checkpoint {path} cannot be written")
        except UserError as error:
            shutil.rmtree(self.scratch.folder / name_of(path), ignore_errors=True)  # the disk may be full of it
            last = self._newest()
            says = f"{name_of(last)} is whole, --resume continues from it" if last else "there is none before it"
            raise UserError(f"{error}; {says}") from error

    def _newest(self) -> str | None:
        with contextlib.suppress(UserError):
            found = newest(self.storage)
            return found.path if found else None
        return None


def _move(written: Path, target: Path) -> None:
    if written.exists():  # it was not moved the time before
        os.rename(written, target)
    sync(target.parent)


def _put(file: Path, path: str, name: str) -> None:
    """Copy a file into a checkpoint in a store."""
    store, place = filesystem(path)
    target = posixpath.join(place, name)
    store.create_dir(posixpath.dirname(target), recursive=True)
    # RECORD under its name must be whole; the others may be of any size, which stores do not all move.
    aside = target + ".part" * (name == RECORD)
    pafs.copy_files(str(file), aside, pafs.LocalFileSystem(), store)
    if aside != target:
        store.move(aside, target)


def _note(path: str, part: int) -> None:
    store, place = filesystem(path)
    store.open_output_stream(f"{place}/{PART}{part}").close()


def _all_noted(path: str, parts: int) -> bool:
    store, place = filesystem(path)
    return all(info.is_file for info in store.get_file_info([f"{place}/{PART}{n}" for n in range(1, parts)]))


def _remove_notes(path: str, parts: int) -> None:
    store, place = filesystem(path)
    for part in range(1, parts):
        if store.get_file_info(f"{place}/{PART}{part}").is_file:
            store.delete_file(f"{place}/{PART}{part}")
