"""Asynchronous publication of checkpoints: written to a staging folder on the node, then published in the background.

Workers write into a `StagingFolder` of their node. If the nodes share the folder of the checkpoints, the staging folder
is on the same file system: worker 0 flushes it to the disk and renames it, so that a checkpoint appears as a whole or
not at all. For an object store, one worker of each node uploads the files that its node has written, then an
upload marker; worker 0 waits for the markers of all nodes and uploads the manifest last. No collective runs next to
those of training.
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
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.fs as pafs

from raybge.training.checkpoint.manifest import (
    MANIFEST,
    checkpoint_name,
    checkpoint_path,
    delete_checkpoint,
    fsync_path,
    latest_checkpoint,
    rotate_checkpoints,
)
from raybge.util.digest import fingerprint
from raybge.util.errors import UserError
from raybge.util.filesystem import STATE_FOLDER, filesystem, is_local
from raybge.util.retry import Result, with_retries

MARKER = ".part-"  # followed by the part's number: upload marker of a node
POLL_SECONDS = 0.5  # between two checks for upload markers
CLOSE_SECONDS = 30  # granted to a publication in progress when training ends with an error


class StagingFolder:
    """Folder for checkpoints before they are published, shared by the workers of a node.

    Args:
        storage: folder or URI of the checkpoints.
        attempt: name of this attempt, unique among those of the run. Staging folders that other attempts left on this
            node are deleted.
    """

    def __init__(self, storage: str, attempt: str):
        if is_local(storage, "--storage_path"):  # on the same file system, so that a folder can be renamed into place
            parent, prefix = Path(filesystem(storage)[1], STATE_FOLDER), "writing-"
        else:
            parent, prefix = Path(tempfile.gettempdir()), f"raybge-{fingerprint(storage)}-"
        self.folder = parent / f"{prefix}{attempt}"
        for other in parent.glob(f"{prefix}*"):
            if other != self.folder:
                _delete_whole(other)

    def create(self) -> None:
        """Create the folder. Only this user may read it: it may be in a folder to which all users can write."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def fetch(self, path: str) -> str:
        """Return a local folder with the checkpoint at `path`; from an object store it is downloaded once per node."""
        store, inner_path = filesystem(path)
        if isinstance(store, pafs.LocalFileSystem):
            return inner_path
        self.create()
        target = self.folder / "fetched" / checkpoint_name(path)
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                partial_copy = str(target) + ".part"
                os.makedirs(partial_copy, exist_ok=True)
                with_retries(
                    lambda: pafs.copy_files(inner_path, partial_copy, store, pafs.LocalFileSystem()),
                    f"{path} cannot be read into {partial_copy}",
                )
                os.rename(partial_copy, target)
        return str(target)

    def delete_fetched(self) -> None:
        """Delete the downloaded checkpoints, once all workers of the node have read them."""
        shutil.rmtree(self.folder / "fetched", ignore_errors=True)

    def delete(self) -> None:
        """Delete the folder."""
        _delete_whole(self.folder)


@dataclass(frozen=True)
class PublishRequest:
    """Publication of one checkpoint.

    Args:
        step: updates done.
        part: part of the checkpoint that this worker publishes; part 0 also marks the checkpoint as complete.
        parts: number of parts.
        commit: writes the manifest into the given folder; None for a model without the state to resume training.
        limit: checkpoints to keep.
        keep: paths of checkpoints that are kept in addition.
    """

    step: int
    part: int
    parts: int
    commit: Callable[[Path], None] | None
    limit: int | None
    keep: Sequence[str]


class CheckpointWriter:
    """Publishes the checkpoints of one worker, one after the other, in a background thread.

    Args:
        storage: folder or URI of the checkpoints.
        staging: staging folder of this node.
        rank: rank of the worker.
        local_rank: its rank within the node.
    """

    def __init__(self, storage: str, staging: StagingFolder, rank: int, local_rank: int):
        self.storage = storage
        self.staging = staging
        self.is_main = rank == 0
        self.is_shared_folder = is_local(storage, "--storage_path")
        self.is_publisher = self.is_main if self.is_shared_folder else local_rank == 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def prepare(self, step: int) -> None:
        """Prepare the staging folder for a new checkpoint. The previous one must have been published."""
        if self.is_publisher:
            self.staging.delete_fetched()
        self.staging.create()
        if self.is_main:  # an incomplete checkpoint of a run that was interrupted here
            path = checkpoint_path(self.storage, step)
            with_retries(lambda: delete_checkpoint(path), f"{path} cannot be written")

    def write(self, step: int, action: Callable[[], None]) -> None:
        """Run an action that writes a part of the checkpoint into the staging folder, with retries."""
        self._with_retries(step, action)

    def publish(self, request: PublishRequest) -> None:
        """Start to publish the checkpoint in the staging folder, which must be written completely."""
        self._thread = threading.Thread(target=self._run, args=(request,), daemon=True, name="checkpoint")
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until this worker's part is published.

        Args:
            timeout: seconds to wait at most; None for no limit.

        Returns:
            False if it is not published yet.

        Raises:
            BaseException: the error that ended the publication.
        """
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
        """Delete the staging folder, after waiting for a publication in progress for a limited time."""
        if self.is_publisher:
            with contextlib.suppress(Exception):
                self.wait(CLOSE_SECONDS)
            self.staging.delete()

    def _run(self, request: PublishRequest) -> None:
        try:
            self._publish(request)
        except BaseException as error:  # raised in the training thread by `wait`
            self._error = error

    def _publish(self, request: PublishRequest) -> None:
        path = checkpoint_path(self.storage, request.step)
        staged = self.staging.folder / checkpoint_name(path)
        if request.commit and not request.part:
            commit = request.commit
            self._with_retries(request.step, lambda: commit(staged))
        if self.is_shared_folder:
            self._with_retries(request.step, lambda: _move(staged, Path(path)))
        else:
            self._upload(request, staged, path)
        if not request.part:  # only now: until here the older checkpoints were the only complete ones
            self._with_retries(request.step, lambda: rotate_checkpoints(path, request.limit, request.keep))

    def _upload(self, request: PublishRequest, staged: Path, path: str) -> None:
        step = request.step
        for file in sorted(each for each in staged.rglob("*") if each.is_file() and each.name != MANIFEST):
            name = file.relative_to(staged).as_posix()
            self._with_retries(step, partial(_upload_file, file, path, name))
        if not staged.is_dir():  # deleted by another attempt, perhaps before its files were listed
            raise FileNotFoundError(f"the checkpoint {path} cannot be written: {staged} is gone")
        if request.part:
            self._with_retries(step, lambda: _create_marker(path, request.part))
        else:
            while not self._with_retries(step, lambda: _all_marked(path, request.parts)):
                time.sleep(POLL_SECONDS)
            if request.commit:
                self._with_retries(step, lambda: _upload_file(staged / MANIFEST, path, MANIFEST))
            self._with_retries(step, lambda: _delete_markers(path, request.parts))
        shutil.rmtree(staged)

    def _with_retries(self, step: int, action: Callable[[], Result]) -> Result:
        path = checkpoint_path(self.storage, step)
        try:
            return with_retries(action, f"the checkpoint {path} cannot be written")
        except UserError as error:
            # The incomplete checkpoint may be what fills the disk.
            shutil.rmtree(self.staging.folder / checkpoint_name(path), ignore_errors=True)
            latest = self._latest_path()
            fallback = (
                f"{checkpoint_name(latest)} is complete, --resume continues from it"
                if latest
                else "there is no earlier checkpoint"
            )
            raise UserError(f"{error}; {fallback}") from error

    def _latest_path(self) -> str | None:
        with contextlib.suppress(UserError):
            checkpoint = latest_checkpoint(self.storage)
            return checkpoint.path if checkpoint else None
        return None


def _delete_whole(folder: Path) -> None:
    """Delete a staging folder in which a thread may still be publishing: all of it is gone at once.

    A checkpoint that has lost some of its files only could still be marked as complete.
    """
    doomed = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _move(staged: Path, target: Path) -> None:
    if staged.exists():  # not moved by an earlier try
        os.rename(staged, target)
    fsync_path(target.parent)


def _upload_file(file: Path, path: str, name: str) -> None:
    """Copy a file into a checkpoint in an object store."""
    store, inner_path = filesystem(path)
    target = posixpath.join(inner_path, name)
    store.create_dir(posixpath.dirname(target), recursive=True)
    # The manifest must be whole under its name, hence a copy and a move. Other files may have a size that not every
    # store can move.
    upload_path = target + ".part" * (name == MANIFEST)
    pafs.copy_files(str(file), upload_path, pafs.LocalFileSystem(), store)
    if upload_path != target:
        store.move(upload_path, target)


def _create_marker(path: str, part: int) -> None:
    store, inner_path = filesystem(path)
    store.open_output_stream(f"{inner_path}/{MARKER}{part}").close()


def _all_marked(path: str, parts: int) -> bool:
    store, inner_path = filesystem(path)
    infos = store.get_file_info([f"{inner_path}/{MARKER}{part}" for part in range(1, parts)])
    return all(info.is_file for info in infos)


def _delete_markers(path: str, parts: int) -> None:
    store, inner_path = filesystem(path)
    for part in range(1, parts):
        if store.get_file_info(f"{inner_path}/{MARKER}{part}").is_file:
            store.delete_file(f"{inner_path}/{MARKER}{part}")
