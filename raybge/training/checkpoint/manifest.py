"""Checkpoint manifests: which checkpoints are complete, which one a run resumes from, and whether it may.

`storage/checkpoint-N/` is a model folder together with the optimizer, the scheduler and the random state of every
worker, as transformers' Trainer writes them after N updates. The manifest file MANIFEST is written last, when all other
files are on the disk: a folder without it is incomplete and is never resumed from. Resuming the data needs only the
manifest: it determines the order of an epoch, and the position in it is a number. `storage` is a folder or a URI that
pyarrow's file systems support.
"""

from __future__ import annotations

import json
import os
import posixpath
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from raybge.util.digest import fingerprint
from raybge.util.errors import UserError
from raybge.util.filesystem import STATE_FOLDER, append_to_path, filesystem
from raybge.util.retry import QUICK, WAITS, with_retries

if TYPE_CHECKING:
    from raybge.data.order import Order
    from raybge.data.survey import Survey

MANIFEST = "raybge.json"
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class RunIdentity:
    """Properties that give a position in the data its meaning. A checkpoint resumes only a run with equal properties.

    Args:
        data: fingerprint of the data files and their row counts.
        global_batch: rows of one step over all workers.
        seed: seed of the order.
        gradient_accumulation_steps: steps of one update.
        order: fingerprint of the order of the rows.
    """

    data: str
    global_batch: int
    seed: int
    gradient_accumulation_steps: int
    order: str

    @staticmethod
    def of(survey: Survey, order: Order, gradient_accumulation_steps: int) -> RunIdentity:
        """Return the identity of a run over the rows of `survey` in `order`."""
        files = [(os.path.basename(f.name), f.size) for f in survey.files]
        return RunIdentity(
            data=fingerprint((files, survey.rows)),
            global_batch=order.global_batch,
            seed=order.seed,
            gradient_accumulation_steps=gradient_accumulation_steps,
            order=order.identity(),
        )


# Error message for each field of RunIdentity that differs; `order` is last because the other fields change it too.
_DIFFERENCES = {
    "data": "--train_data has other files or rows than",
    "global_batch": "--global_batch_size is {now}, but {then} in",
    "seed": "--seed (or --data_seed) is {now}, but {then} in",
    "gradient_accumulation_steps": "--gradient_accumulation_steps is {now}, but {then} in",
    "order": "the flags that choose and order the rows differ from those of",
}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Args:
        path: its folder or URI.
        step: updates done.
        epoch: epoch of the data stream.
        position: steps of that epoch that were read.
        identity: identity of the run that wrote it.
    """

    path: str
    step: int
    epoch: int
    position: int
    identity: RunIdentity

    def check(self, identity: RunIdentity) -> None:
        """Raise a UserError that names the differing flag if a run of this identity cannot resume from here."""
        for name, difference in _DIFFERENCES.items():
            now, then = getattr(identity, name), getattr(self.identity, name)
            if now != then:
                raise UserError(
                    f"cannot continue: {difference.format(now=now, then=then)} {self.path}; use the flags of that "
                    "run, or start anew with --overwrite_output_dir"
                )


# --- reading ----------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path, flag: str) -> Checkpoint:
    """Read the manifest of a checkpoint.

    Args:
        path: folder or URI of the checkpoint.
        flag: flag that names it, for error messages.

    Returns:
        The checkpoint, its path absolute.

    Raises:
        UserError: there is no checkpoint at `path`, or an incomplete one.
    """
    path = _absolute(str(path))

    def read() -> bytes | None:
        store, inner_path = filesystem(path)
        if not store.get_file_info(f"{inner_path}/{MANIFEST}").is_file:
            return None
        with store.open_input_stream(f"{inner_path}/{MANIFEST}") as stream:
            return stream.read()

    content = with_retries(read, f"{flag}: {path} cannot be read", WAITS[:QUICK])
    if content is None:
        raise UserError(
            f"{flag}: {path} is not a complete checkpoint of raybge.train ({MANIFEST}, which is written last, is "
            "missing)"
        )
    try:
        record = json.loads(content)
        identity = RunIdentity(**{f.name: record[f.name] for f in fields(RunIdentity)})
        return Checkpoint(path, record["step"], record["epoch"], record["position"], identity)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag}: {path}/{MANIFEST} cannot be read ({error})") from error


def latest_checkpoint(storage: str | Path) -> Checkpoint | None:
    """Return the complete checkpoint with the most updates; None if there is none."""

    def find() -> str | None:
        return next((path for path in list_checkpoints(storage) if is_complete(path)), None)

    path = with_retries(find, f"--storage_path: {storage} cannot be read", WAITS[:QUICK])
    return load_checkpoint(path, "--storage_path") if path else None


def is_complete(path: str | Path) -> bool:
    """Return whether a run could resume from the checkpoint at `path`."""
    store, inner_path = filesystem(str(path))
    return store.get_file_info(f"{inner_path}/{MANIFEST}").is_file


def list_checkpoints(storage: str | Path) -> list[str]:
    """Return the paths of all checkpoints, complete or not, the one with the most updates first."""
    storage = _absolute(str(storage))
    store, folder = filesystem(storage)
    infos = store.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    names = [i.base_name for i in infos if i.type == pafs.FileType.Directory and i.base_name.startswith(PREFIX)]
    steps = [int(name.removeprefix(PREFIX)) for name in names if name.removeprefix(PREFIX).isdecimal()]
    return [checkpoint_path(storage, step) for step in sorted(steps, reverse=True)]


def checkpoint_path(storage: str | Path, step: int) -> str:
    """Return the path of the checkpoint after `step` updates."""
    return append_to_path(str(storage), f"/{PREFIX}{step}")


def checkpoint_name(path: str | Path) -> str:
    """Return the name of a checkpoint, for example "checkpoint-200"."""
    return _split(str(path))[1]


# --- writing ----------------------------------------------------------------------------------------------------------


def commit_checkpoint(folder: Path, step: int, epoch: int, position: int, identity: RunIdentity) -> None:
    """Mark the checkpoint in `folder` as complete: flush its files to the disk, then write the manifest."""
    for path in folder.rglob("*"):
        fsync_path(path)
    record = {"step": step, "epoch": epoch, "position": position, **asdict(identity)}
    partial = folder / (MANIFEST + ".part")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    fsync_path(partial)
    partial.replace(folder / MANIFEST)
    fsync_path(folder)


def delete_checkpoint(path: str | Path) -> None:
    """Delete a checkpoint, the manifest first: after a crash in between it counts as incomplete."""
    store, inner_path = filesystem(str(path))
    if store.get_file_info(f"{inner_path}/{MANIFEST}").is_file:
        store.delete_file(f"{inner_path}/{MANIFEST}")
    if store.get_file_info(inner_path).type == pafs.FileType.Directory:
        store.delete_dir(inner_path)


def rotate_checkpoints(path: str | Path, limit: int | None, keep: Sequence[str] = ()) -> None:
    """Delete the oldest checkpoints until `limit` are left.

    Args:
        path: the checkpoint that was just written, which stays.
        limit: checkpoints to keep; None or 0: all.
        keep: other checkpoints that stay.
    """
    older = [each for each in list_checkpoints(_split(str(path))[0]) if _step(each) < _step(path)]
    protected = {checkpoint_name(path)} | {checkpoint_name(each) for each in keep} & {*map(checkpoint_name, older)}
    excess = 1 + len(older) - max(limit, len(protected)) if limit and limit > 0 else 0
    for each in [each for each in reversed(older) if checkpoint_name(each) not in protected][: max(0, excess)]:
        delete_checkpoint(each)


def check_writable(storage: str | Path) -> None:
    """Raise a UserError if checkpoints cannot be written to `storage`."""

    def write() -> None:
        store, folder = filesystem(str(storage))
        probe = posixpath.join(folder, f"{STATE_FOLDER}-{uuid.uuid4().hex}")
        store.create_dir(folder, recursive=True)
        store.open_output_stream(probe).close()
        store.delete_file(probe)

    with_retries(write, f"--storage_path {storage} cannot be written", WAITS[:QUICK])


def fsync_path(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- resuming ---------------------------------------------------------------------------------------------------------


def resume_checkpoint(training: dict[str, Any], resume: bool, storage: str | Path) -> Checkpoint | None:
    """Return the checkpoint that --resume or --resume_from_checkpoint selects.

    Args:
        training: the TrainingArguments flags.
        resume: --resume.
        storage: folder or URI of the checkpoints.

    Returns:
        The checkpoint; None to start from the beginning.

    Raises:
        UserError: --resume_from_checkpoint names no complete checkpoint, or not the one a restart would resume from.
    """
    flag = _resume_flag(training)
    if isinstance(flag, bool):
        return latest_checkpoint(storage) if resume_requested(training, resume) else None
    checkpoint = load_checkpoint(flag, "--resume_from_checkpoint")
    latest = latest_checkpoint(storage)
    if latest and latest.path != checkpoint.path:
        raise UserError(
            f"--resume_from_checkpoint {flag}: a restart would continue from {latest.path} instead; "
            "remove that checkpoint, or choose another --output_dir"
        )
    return checkpoint


def resume_requested(training: dict[str, Any], resume: bool) -> bool:
    """Return True if --resume or --resume_from_checkpoint requests to resume a run."""
    return resume or bool(_resume_flag(training))


def _resume_flag(training: dict[str, Any]) -> bool | str:
    """Return the value of --resume_from_checkpoint: False, True, or the name of a checkpoint."""
    text = str(training.get("resume_from_checkpoint") or False)
    return text.lower() == "true" if text.lower() in ("true", "false") else text


def _absolute(path: str) -> str:
    """Return the canonical form of a path: absolute; for a URI of the local file system, the path."""
    if "://" not in path:
        return os.path.abspath(path)
    store, inner_path = filesystem(path)
    return inner_path if isinstance(store, pafs.LocalFileSystem) else path


def _split(path: str) -> tuple[str, str]:
    """Split a checkpoint's path into the folder or URI that contains it and its name."""
    head, mark, query = path.partition("?") if "://" in path else (path, "", "")
    parent, _, name = head.rstrip("/").rpartition("/")
    return parent + mark + query, name


def _step(path: str | Path) -> int:
    return int(checkpoint_name(path).removeprefix(PREFIX))
