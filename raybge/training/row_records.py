"""Which rows each step trained, written down while it trains, so that anyone can check an epoch.

    python -m raybge.row_log runs/mine

The n-th start of a run's workers writes `rows/n.json`, which says what its lines mean, and each worker
`rows/n-RANK.jsonl`: a line for each of its steps, {"epoch", "step", "update", "rows"}, with `step` counted from 0
within the epoch, the update that the step is part of counted from 1, and the worker's rows as [file, byte offset of the
line]. A line is on the disk before its step begins. A start that continues after update s replaces what earlier ones
trained behind it: what is left are the steps that the model is made of.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.data.order import Order
    from raybge.data.survey import Survey

FOLDER = "rows"  # of the output folder
NAMED = 5  # rows that a message names


# --- write ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowLog:
    """What the driver knows of a run's log; `number` is that of the start of its workers."""

    folder: str
    about: dict[str, Any]
    number: int = 0

    @classmethod
    def of(cls, output: Path, survey: Survey, order: Order) -> RowLog:
        """The log of a run over `survey`'s rows in `order`.

        `files` has of each file its name, the path that offsets are of (another one where the file was compressed),
        how many of its rows are used, and how often they come in an epoch in all. `left_out`: rows of an epoch that
        --dataloader_drop_last leaves out.
        """
        mixture = order.mixture
        found = zip(survey.files, mixture.used_F.tolist(), mixture.total_F.tolist(), strict=True)
        files = [{"name": file.name, "path": file.path, "used": used, "an_epoch": n} for file, used, n in found]
        left_out = np.maximum(order.total_D - order.steps_D * order.global_batch, 0).sum()
        return cls(str(output / FOLDER), {"steps": order.steps, "left_out": int(left_out), "files": files})

    def begin(self, first_update: int, workers: int) -> RowLog:
        """The log of the next start, after `first_update` updates. Called in the driver: a number is taken once."""
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        number = max(_numbers(folder), default=0) + 1
        about = {"first_update": first_update, "workers": workers, **self.about}
        with open(folder / f"{number}.json", "x") as file:
            file.write(json.dumps(about, indent=2) + "\n")
        return RowLog(self.folder, self.about, number)

    def lines(self, rank: int) -> Lines:
        """What worker `rank` writes."""
        return Lines(Path(self.folder, f"{self.number}-{rank}.jsonl"))


@dataclass(frozen=True)
class Lines:
    """The file of one worker."""

    path: Path

    def write(self, epoch: int, step: int, update: int, rows: Sequence[tuple[int, int]]) -> None:
        """A step is about to be trained. On return this is on the disk: a machine that is lost takes nothing along."""
        line = {"epoch": epoch, "step": step, "update": update, "rows": rows}
        with open(self.path, "a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())


# --- read -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A step that the model is made of, over all its workers: `rows` are (file, byte offset), worker after worker."""

    epoch: int
    step: int
    update: int
    rows: list[tuple[int, int]]


@dataclass(frozen=True)
class Epoch:
    """What an epoch had: `steps` of its `of`, with so many `rows`; `too_often` are those, as (file's name, byte
    offset), that came more often than they should, `too_seldom` how many came less often, -1 while steps are missing.
    """

    epoch: int
    steps: int
    of: int
    rows: int
    too_often: list[tuple[str, int]]
    too_seldom: int

    @property
    def exact(self) -> bool:
        """Each row as often as it should be: once, where no --dataset_weights says otherwise."""
        return self.steps == self.of and not self.too_often and not self.too_seldom

    def describe(self) -> str:
        """One line."""
        says = f"epoch {self.epoch}: {self.rows:,} rows in {self.steps:,} of {self.of:,} steps"
        if self.exact:
            return f"{says}, each as often as it should be"
        says += f", {len(self.too_often):,} rows too often" if self.too_often else ", none too often"
        says += "".join(f" {name}:{offset}" for name, offset in self.too_often[:NAMED])
        return says + (f", {self.too_seldom:,} too seldom" if self.too_seldom >= 0 else "")


def steps(output: str | Path) -> Iterator[Step]:
    """The steps that the model in a run's output folder is made of, in the order in which they were trained.

    One step is held in memory at a time. UserError where the run was not started with --log_rows.
    """
    folder = Path(output) / FOLDER
    starts = _starts(folder)
    for number, about in starts.items():
        until = min((later["first_update"] for n, later in starts.items() if n > number), default=None)
        for parts in _together(folder, number, about["workers"]):
            first = parts[0]
            if until is not None and first["update"] > until:
                break
            rows = [(file, offset) for part in parts for file, offset in part["rows"]]
            yield Step(first["epoch"], first["step"], first["update"], rows)


def epochs(output: str | Path) -> Iterator[Epoch]:
    """Whether each row was trained as often as it should be, epoch by epoch; the last may be unfinished.

    Memory: 16 bytes for each row of an epoch.
    """
    about = list(_starts(Path(output) / FOLDER).values())[-1]
    for epoch, found in groupby(steps(output), key=lambda step: step.epoch):
        yield _epoch(epoch, found, about)


def _epoch(epoch: int, found: Iterator[Step], about: dict[str, Any]) -> Epoch:
    files = about["files"]
    numbers, parts = set(), []
    for step in found:
        numbers.add(step.step)
        parts.append(np.array(step.rows, np.int64).reshape(-1, 2))
    rows_N2 = np.concatenate(parts)
    whole = len(numbers) == about["steps"]
    too_often: list[tuple[str, int]] = []
    too_seldom = 0
    for i, file in enumerate(files):
        offset_U, count_U = np.unique(rows_N2[rows_N2[:, 0] == i, 1], return_counts=True)
        least, extra = divmod(file["an_epoch"], max(file["used"], 1))
        too_often += [(file["name"], int(offset)) for offset in offset_U[count_U > least + (extra > 0)]]
        never = file["used"] - len(offset_U) if least else 0
        too_seldom += never + int((count_U < least).sum())
    due = sum(file["an_epoch"] for file in files) - about["left_out"]
    too_seldom = max(too_seldom - about["left_out"], due - len(rows_N2), 0) if whole else -1
    return Epoch(epoch, len(numbers), about["steps"], len(rows_N2), too_often, too_seldom)


def _starts(folder: Path) -> dict[int, dict[str, Any]]:
    """What each start of the workers says, by its number, in ascending order."""
    texts = {number: (folder / f"{number}.json").read_text() for number in sorted(_numbers(folder))}
    # without its last newline: the driver was killed while it wrote, and no worker started
    found = {number: json.loads(text) for number, text in texts.items() if text.endswith("\n")}
    if not found:
        raise UserError(f"{folder} holds no log of rows: it is --log_rows that writes one")
    return found


def _together(folder: Path, number: int, workers: int) -> Iterator[tuple[dict[str, Any], ...]]:
    """Each step's lines, worker by worker, as far as all workers have one: the last step may have been cut short."""
    with contextlib.ExitStack() as stack:
        paths = [folder / f"{number}-{rank}.jsonl" for rank in range(workers)]
        if not all(path.exists() for path in paths):
            return  # ended before it trained
        files = [stack.enter_context(open(path)) for path in paths]
        yield from zip(*(_whole_lines(file) for file in files), strict=False)


def _whole_lines(file: Any) -> Iterator[dict[str, Any]]:
    for line in file:
        if not line.endswith("\n"):  # its worker was killed while it wrote
            return
        yield json.loads(line)


def _numbers(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()]


def main(output: str) -> int:
    """Print a line for each epoch; 1 where a finished one is not exact."""
    found = list(epochs(output))
    for epoch in found:
        print(epoch.describe())
    return int(any(epoch.too_often or not (epoch.exact or epoch is found[-1]) for epoch in found))
