"""Checkpoints: when one is whole, which one a run continues from, and whether it may.

`storage/checkpoint-N/` is a model folder with the optimizer, the scheduler and every worker's random state beside it,
as transformers' Trainer writes them after N updates. RECORD is written last, when all of it is on the disk: a folder
without it is half-written and is never continued from. Reading needs nothing but RECORD: an epoch's order follows from
what it says, and the position in it is a number.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raybge.errors import UserError

if TYPE_CHECKING:
    from raybge.data.order import Order
    from raybge.data.survey import Survey

RECORD = "raybge.json"
RESULTS = "train_results.json"  # in the output folder, written last: the run is finished
HIDDEN = ".raybge"  # in the output folder: what a run keeps for itself
_PREFIX = "checkpoint-"


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
                    f"cannot continue: {says.format(now=mine, then=its)} {self.path}; give what that run had, or "
                    "start anew with --overwrite_output_dir"
                )


def seal(folder: Path, step: int, epoch: int, position: int, identity: Identity) -> None:
    """Declare the checkpoint in `folder` whole, once everything in it is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    record = {"step": step, "epoch": epoch, "position": position, **asdict(identity)}
    aside = folder / (RECORD + ".part")
    aside.write_text(json.dumps(record, indent=2) + "\n")
    _sync(aside)
    aside.replace(folder / RECORD)


def discard(folder: Path) -> None:
    """Remove a checkpoint; a crash in between leaves one that counts as half-written."""
    (folder / RECORD).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def load(path: str | Path, flag: str) -> Checkpoint:
    """The checkpoint at `path`. UserError naming `flag` where there is none, or half of one."""
    path = Path(os.path.abspath(path))
    try:
        record = json.loads((path / RECORD).read_text())
        identity = Identity(**{f.name: record[f.name] for f in fields(Identity)})
        return Checkpoint(str(path), record["step"], record["epoch"], record["position"], identity)
    except FileNotFoundError:
        raise UserError(
            f"{flag}: {path} is no whole checkpoint of raybge.train (it has no {RECORD}, which is written last)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag}: {path / RECORD} cannot be read ({error})") from error


def newest(storage: Path) -> Checkpoint | None:
    """The whole checkpoint with the most updates, None where there is none."""
    whole = (path for path in _numbered(storage) if (path / RECORD).is_file())
    return next((load(path, "--storage_path") for path in whole), None)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until `limit` are left with `folder`, which was just written; `best` stays too."""
    older = [path for path in _numbered(folder.parent) if _number(path) < _number(folder)]
    kept = {folder.name} | ({Path(best).name} if best else set())
    excess = 1 + len(older) - max(limit, len(kept)) if limit and limit > 0 else 0
    for path in [path for path in reversed(older) if path.name not in kept][: max(0, excess)]:
        discard(path)


def starting_point(training: dict[str, Any], resume: bool, storage: Path) -> Checkpoint | None:
    """What --resume or --resume_from_checkpoint says to continue from; None: start from the beginning."""
    wanted = training.get("resume_from_checkpoint")
    if not wanted or str(wanted).lower() in ("true", "false"):
        return newest(storage) if resumes(training, resume) else None
    found = load(str(wanted), "--resume_from_checkpoint")
    last = newest(storage)
    if last and last.path != found.path:
        raise UserError(
            f"--resume_from_checkpoint {wanted}: a restart would continue from {last.path} instead; remove that, or "
            "choose another --output_dir"
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


def _numbered(storage: Path) -> list[Path]:
    """The checkpoints, whole or not, the one with the most updates first."""
    found = (p for p in storage.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit())
    return sorted(found, key=_number, reverse=True)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


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
