"""Checkpoints: when one is whole, which one a run continues from, and whether it may.

`storage/checkpoint-N/` is a model folder with the optimizer, the scheduler and every worker's random state beside it,
as transformers' Trainer writes them after N updates. RECORD is written last, when all of it is on the disk: a folder
without it is half-written and is never continued from. Reading needs nothing but RECORD: an epoch's order follows from
what it says, and the position in it is a number. `storage` is a folder or a URI that pyarrow's file systems know.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shutil
import uuid
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.fs as pafs

from raybge.util.errors import UserError
from raybge.util.filesystem import HIDDEN, extended, filesystem
from raybge.util.retry import QUICK, WAITS, retried

if TYPE_CHECKING:
    from raybge.data.order import Order
    from raybge.data.survey import Survey

RECORD = "raybge.json"
RESULTS = "train_results.json"  # in the output folder, written last: the run is finished
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Identity:
    """What a position means. A checkpoint continues a run only where all of it is the same."""

    data: str
    global_batch: int
    seed: int
    gradient_accumulation_steps: int
    order: str

    @staticmethod
    def of(survey: Survey, order: Order, gradient_accumulation_steps: int) -> Identity:
        """The identity of a run over `survey`'s rows in `order`."""
        files = [(os.path.basename(f.name), f.size) for f in survey.files]
        return Identity(
            data=digest((files, survey.rows)),
            global_batch=order.global_batch,
            seed=order.seed,
            gradient_accumulation_steps=gradient_accumulation_steps,
            order=digest(vars(order)),
        )


# What a person has to mend where a field of Identity differs; `order` last, since the others change it too.
_FLAGS = {
    "data": "--train_data has other files or rows than",
    "global_batch": "--global_batch_size is {now}, but {then} in",
    "seed": "--seed (or --data_seed) is {now}, but {then} in",
    "gradient_accumulation_steps": "--gradient_accumulation_steps is {now}, but {then} in",
    "order": "the flags that choose and order the rows differ from those of",
}


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: `step` updates are done, `position` steps of the stream in `epoch` are read."""

    path: str
    step: int
    epoch: int
    position: int
    identity: Identity

    def check(self, now: Identity) -> None:
        """UserError that names the flag when a run of this identity cannot continue from here."""
        for name, says in _FLAGS.items():
            mine, its = getattr(now, name), getattr(self.identity, name)
            if mine != its:
                raise UserError(
                    f"cannot continue: {says.format(now=mine, then=its)} {self.path}; give what that run had, "
                    "or start anew with --overwrite_output_dir"
                )


def seal(folder: Path, step: int, epoch: int, position: int, identity: Identity) -> None:
    """Declare the checkpoint in `folder` whole, once everything in it is on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    record = {"step": step, "epoch": epoch, "position": position, **asdict(identity)}
    aside = folder / (RECORD + ".part")
    aside.write_text(json.dumps(record, indent=2) + "\n")
    sync(aside)
    aside.replace(folder / RECORD)
    sync(folder)


def discard(path: str | Path) -> None:
    """Remove a checkpoint; a crash in between leaves one that counts as half-written."""
    store, place = filesystem(str(path))
    if store.get_file_info(f"{place}/{RECORD}").is_file:
        store.delete_file(f"{place}/{RECORD}")
    if store.get_file_info(place).type == pafs.FileType.Directory:
        store.delete_dir(place)


def load(path: str | Path, flag: str) -> Checkpoint:
    """The checkpoint at `path`. UserError naming `flag` where there is none, or half of one."""
    path = _absolute(str(path))
    says = f"{flag}: {path}"

    def read() -> bytes | None:
        store, place = filesystem(path)
        if not store.get_file_info(f"{place}/{RECORD}").is_file:
            return None
        with store.open_input_stream(f"{place}/{RECORD}") as stream:
            return stream.read()

    found = retried(read, f"{says} cannot be read", WAITS[:QUICK])
    if found is None:
        raise UserError(f"{says} is no whole checkpoint of raybge.train (it has no {RECORD}, which is written last)")
    try:
        record = json.loads(found)
        identity = Identity(**{f.name: record[f.name] for f in fields(Identity)})
        return Checkpoint(path, record["step"], record["epoch"], record["position"], identity)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{says}/{RECORD} cannot be read ({error})") from error


def newest(storage: str | Path) -> Checkpoint | None:
    """The whole checkpoint with the most updates, None where there is none."""

    def find() -> str | None:
        return next((path for path in numbered(storage) if is_whole(path)), None)

    found = retried(find, f"--storage_path: {storage} cannot be read", WAITS[:QUICK])
    return load(found, "--storage_path") if found else None


def is_whole(path: str | Path) -> bool:
    """Whether a run could continue from here."""
    store, place = filesystem(str(path))
    return store.get_file_info(f"{place}/{RECORD}").is_file


def rotate(path: str | Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until `limit` are left with `path`, which was just written; `best` stays too."""
    older = [each for each in numbered(_parts(str(path))[0]) if _number(each) < _number(path)]
    kept = {name_of(path)} | ({name_of(best)} if best else set())
    excess = 1 + len(older) - max(limit, len(kept)) if limit and limit > 0 else 0
    for each in [each for each in reversed(older) if name_of(each) not in kept][: max(0, excess)]:
        discard(each)


def numbered(storage: str | Path) -> list[str]:
    """The paths of the checkpoints, whole or not, the one with the most updates first."""
    storage = _absolute(str(storage))
    store, place = filesystem(storage)
    infos = store.get_file_info(pafs.FileSelector(place, allow_not_found=True))
    names = [i.base_name for i in infos if i.type == pafs.FileType.Directory and i.base_name.startswith(PREFIX)]
    steps = [int(name.removeprefix(PREFIX)) for name in names if name.removeprefix(PREFIX).isdecimal()]
    return [path_of(storage, step) for step in sorted(steps, reverse=True)]


def path_of(storage: str | Path, step: int) -> str:
    """Where the checkpoint after so many updates lies."""
    return extended(str(storage), f"/{PREFIX}{step}")


def name_of(path: str | Path) -> str:
    """A checkpoint's name, "checkpoint-200"."""
    return _parts(str(path))[1]


def check_writable(storage: str | Path) -> None:
    """UserError where no checkpoint could be written."""

    def write() -> None:
        store, place = filesystem(str(storage))
        probe = posixpath.join(place, f"{HIDDEN}-{uuid.uuid4().hex}")
        store.create_dir(place, recursive=True)
        store.open_output_stream(probe).close()
        store.delete_file(probe)

    retried(write, f"--storage_path {storage} cannot be written", WAITS[:QUICK])


def starting_point(training: dict[str, Any], resume: bool, storage: str | Path) -> Checkpoint | None:
    """What --resume or --resume_from_checkpoint says to continue from; None: start from the beginning."""
    wanted = training.get("resume_from_checkpoint")
    if not wanted or str(wanted).lower() in ("true", "false"):
        return newest(storage) if resumes(training, resume) else None
    found = load(str(wanted), "--resume_from_checkpoint")
    last = newest(storage)
    if last and last.path != found.path:
        raise UserError(
            f"--resume_from_checkpoint {wanted}: a restart would continue from {last.path} instead; "
            "remove that, or choose another --output_dir"
        )
    return found


def resumes(training: dict[str, Any], resume: bool) -> bool:
    """Whether a run is to be continued at all."""
    wanted = training.get("resume_from_checkpoint")
    return resume or (bool(wanted) and str(wanted).lower() != "false")


def finished(output: Path) -> dict[str, float] | None:
    """The metrics of the finished run whose model is in `output`, None where there is none."""
    try:
        return json.loads((output / RESULTS).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{output / RESULTS} cannot be read ({error})") from error


# Whatever a model folder of any tool may hold at its top: a file of the old model beside the new one, adapters or
# another tokenizer's, would be loaded with it.
_MODEL_FILES = (
    "modules.json config.json adapter_config.json *.safetensors *.safetensors.index.json pytorch_model*.bin* "
    "config_sentence_transformers.json sentence_*_config.json tokenizer* special_tokens_map.json added_tokens.json "
    "vocab.* merges.txt sentencepiece* spiece.model chat_template* README.md report.html trainer_state.json [0-9]_*/*.*"
).split()


def publish(aside: Path, output: Path) -> None:
    """Move a finished run's model from `aside` to `output`, whose file system it shares.

    Folders cannot be swapped where other files lie beside the model. So RESULTS goes first, then what makes the old
    model open, then its other files; the new model's config.json and modules.json come behind its other files, RESULTS
    last. At any moment in between, nothing opens a mixture, and the run counts as unfinished.
    """
    (output / RESULTS).unlink(missing_ok=True)
    for pattern in _MODEL_FILES:
        for old in output.glob(pattern):
            if old.is_file():
                old.unlink()
            if old.parent != output and not any(old.parent.iterdir()):
                old.parent.rmdir()
    last = ("config.json", "modules.json", RESULTS)
    for path in sorted(aside.iterdir(), key=lambda p: (last.index(p.name) if p.name in last else -1, p.name)):
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    aside.rmdir()


def _absolute(path: str) -> str:
    """A path as it is written everywhere: absolute, and that of a folder where a URI means one of this machine."""
    if "://" not in path:
        return os.path.abspath(path)
    store, place = filesystem(path)
    return place if isinstance(store, pafs.LocalFileSystem) else path


def _parts(path: str) -> tuple[str, str]:
    """(folder or URI that a checkpoint lies in, its name)."""
    head, mark, query = path.partition("?") if "://" in path else (path, "", "")
    parent, _, name = head.rstrip("/").rpartition("/")
    return parent + mark + query, name


def _number(path: str | Path) -> int:
    return int(name_of(path).removeprefix(PREFIX))


def sync(path: Path) -> None:
    """Wait until what is written in a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(value: Any) -> str:
    """A fingerprint of plain values, arrays and objects that hold them: equal in every process."""
    state = hashlib.blake2b(digest_size=12)

    def feed(part: Any) -> None:
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        elif isinstance(part, dict):
            feed(sorted(part.items()))
        elif isinstance(part, list | tuple):
            state.update(f"[{len(part)}".encode())
            for each in part:
                feed(each)
        elif is_dataclass(part) or hasattr(part, "__dict__"):
            feed(vars(part))
        else:
            state.update(repr(part).encode() + b";")

    feed(value)
    return state.hexdigest()
