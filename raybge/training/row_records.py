"""Record of the rows that each step trained, written during training, so that anyone can check an epoch.

    python -m raybge.row_log runs/mine

The n-th attempt of a run (start of its workers) writes `rows/n.json`, which describes it, and each worker
`rows/n-RANK.jsonl`: a line for each of its steps, {"epoch", "step", "update", "rows"}, with `step` counted from 0
within the epoch, the update that the step is part of counted from 1, and the worker's rows as [file, byte offset of the
line]. A line is on the disk before its step begins. An attempt that continues after update s replaces all later updates
of earlier attempts: what remains are the steps that the model is made of.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.data.order import Order
    from raybge.data.survey import Survey

FOLDER = "rows"  # in the output folder
MAX_NAMED = 5  # rows that a message names


# --- write ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowLog:
    """Row records of a run, on the side of its driver.

    Args:
        folder: folder of the records.
        description: steps, files and rows of an epoch, equal for all attempts.
        number: number of the attempt, counted from 1; 0 before the first.
    """

    folder: str
    description: dict[str, Any]
    number: int = 0

    @classmethod
    def of(cls, output: Path, survey: Survey, order: Order) -> RowLog:
        """Describe a run over the rows of `survey` in `order`.

        For each file the description has its name, the path that offsets refer to (another one if the file was
        compressed), the number of its rows that are used, and the number of rows that an epoch takes from it.
        `left_out` is the number of rows of an epoch that --dataloader_drop_last leaves out.
        """
        mixture = order.mixture
        counts = zip(survey.files, mixture.used_F.tolist(), mixture.total_F.tolist(), strict=True)
        files = [{"name": file.name, "path": file.path, "used": used, "an_epoch": n} for file, used, n in counts]
        left_out = np.maximum(order.total_D - order.steps_D * order.global_batch, 0).sum()
        return cls(str(output / FOLDER), {"steps": order.steps, "left_out": int(left_out), "files": files})

    def begin(self, first_update: int, workers: int) -> RowLog:
        """Describe the next attempt in its own file, in the driver.

        Args:
            first_update: updates that are done before.
            workers: workers of the attempt.

        Returns:
            The log with the attempt's number, which no other attempt of the run has.
        """
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        number = max(_attempt_numbers(folder), default=0) + 1
        description = {"first_update": first_update, "workers": workers, **self.description}
        with open(folder / f"{number}.json", "x") as file:
            file.write(json.dumps(description, indent=2) + "\n")
        return replace(self, number=number)

    def writer(self, rank: int) -> RowWriter:
        """Return the writer of worker `rank`."""
        return RowWriter(Path(self.folder, f"{self.number}-{rank}.jsonl"))


@dataclass(frozen=True)
class RowWriter:
    """Writer of one worker's file."""

    path: Path

    def write(self, epoch: int, step: int, update: int, rows: Sequence[tuple[int, int]]) -> None:
        """Record a step before it is trained. On return the line is on the disk and survives the loss of the machine.

        Args:
            epoch: counted from 0.
            step: step of the epoch, counted from 0.
            update: update that the step is part of, counted from 1.
            rows: (file, byte offset) of the worker's rows.
        """
        line = {"epoch": epoch, "step": step, "update": update, "rows": rows}
        with open(self.path, "a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())


# --- read -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordedStep:
    """A step that the model is made of, over all its workers: `rows` are (file, byte offset), worker after worker."""

    epoch: int
    step: int
    update: int
    rows: list[tuple[int, int]]


@dataclass(frozen=True)
class RecordedEpoch:
    """Rows of a recorded epoch, compared with those that it should have.

    Args:
        epoch: counted from 0.
        steps: recorded steps.
        of: steps of a complete epoch.
        rows: recorded rows.
        too_often: (file name, byte offset) of the rows that occur more often than they should.
        too_seldom: number of rows that occur less often; -1 while steps are missing.
    """

    epoch: int
    steps: int
    of: int
    rows: int
    too_often: list[tuple[str, int]]
    too_seldom: int

    @property
    def exact(self) -> bool:
        """True if each row occurs as often as it should: once, unless --dataset_weights is given."""
        return self.steps == self.of and not self.too_often and not self.too_seldom

    def describe(self) -> str:
        """Return one line for the user."""
        text = f"epoch {self.epoch}: {self.rows:,} rows in {self.steps:,} of {self.of:,} steps"
        if self.exact:
            return f"{text}, each as often as it should be"
        text += f", {len(self.too_often):,} rows too often" if self.too_often else ", none too often"
        text += "".join(f" {name}:{offset}" for name, offset in self.too_often[:MAX_NAMED])
        return text + (f", {self.too_seldom:,} too seldom" if self.too_seldom >= 0 else "")


def steps(output: str | Path) -> Iterator[RecordedStep]:
    """Read the steps that the model in a run's output folder is made of, in the order in which they were trained.

    One step is held in memory at a time.

    Args:
        output: the run's output folder.

    Yields:
        The steps.

    Raises:
        UserError: the run was not started with --log_rows.
    """
    folder = Path(output) / FOLDER
    attempts = _attempts(folder)
    for number, description in attempts.items():
        last = min((later["first_update"] for n, later in attempts.items() if n > number), default=None)
        for parts in _complete_steps(folder, number, description["workers"]):
            first = parts[0]
            if last is not None and first["update"] > last:
                break
            rows = [(file, offset) for part in parts for file, offset in part["rows"]]
            yield RecordedStep(first["epoch"], first["step"], first["update"], rows)


def epochs(output: str | Path) -> Iterator[RecordedEpoch]:
    """Check epoch by epoch that each row was trained as often as it should be. Memory: 16 bytes per row of an epoch.

    Args:
        output: the run's output folder.

    Yields:
        The epochs; the last one may be unfinished.
    """
    description = list(_attempts(Path(output) / FOLDER).values())[-1]
    for epoch, group in groupby(steps(output), key=lambda step: step.epoch):
        yield _check_epoch(epoch, group, description)


def _check_epoch(epoch: int, recorded: Iterator[RecordedStep], description: dict[str, Any]) -> RecordedEpoch:
    files = description["files"]
    numbers, parts = set(), []
    for step in recorded:
        numbers.add(step.step)
        parts.append(np.array(step.rows, np.int64).reshape(-1, 2))
    rows_N2 = np.concatenate(parts)
    complete = len(numbers) == description["steps"]
    too_often: list[tuple[str, int]] = []
    too_seldom = 0
    for i, file in enumerate(files):
        offset_U, count_U = np.unique(rows_N2[rows_N2[:, 0] == i, 1], return_counts=True)
        least, extra = divmod(file["an_epoch"], max(file["used"], 1))
        too_often += [(file["name"], int(offset)) for offset in offset_U[count_U > least + (extra > 0)]]
        never = file["used"] - len(offset_U) if least else 0
        too_seldom += never + int((count_U < least).sum())
    expected = sum(file["an_epoch"] for file in files) - description["left_out"]
    too_seldom = max(too_seldom - description["left_out"], expected - len(rows_N2), 0) if complete else -1
    return RecordedEpoch(epoch, len(numbers), description["steps"], len(rows_N2), too_often, too_seldom)


def _attempts(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the description of each attempt by its number, in ascending order."""
    texts = {number: (folder / f"{number}.json").read_text() for number in sorted(_attempt_numbers(folder))}
    # Without its last newline the file is incomplete: the driver was killed, and no worker started.
    attempts = {number: json.loads(text) for number, text in texts.items() if text.endswith("\n")}
    if not attempts:
        raise UserError(f"{folder} holds no row records: a run writes them with --log_rows")
    return attempts


def _complete_steps(folder: Path, number: int, workers: int) -> Iterator[tuple[dict[str, Any], ...]]:
    """Yield each step's lines, worker by worker, as long as all workers have one: the last step may be incomplete."""
    with contextlib.ExitStack() as stack:
        paths = [folder / f"{number}-{rank}.jsonl" for rank in range(workers)]
        if not all(path.exists() for path in paths):
            return  # the attempt ended before its first step
        files = [stack.enter_context(open(path)) for path in paths]
        yield from zip(*(_complete_lines(file) for file in files), strict=False)


def _complete_lines(file: Any) -> Iterator[dict[str, Any]]:
    for line in file:
        if not line.endswith("\n"):  # the worker was killed while it wrote
            return
        yield json.loads(line)


def _attempt_numbers(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()]


def main(output: str) -> int:
    """Print a line for each epoch.

    Args:
        output: the run's output folder.

    Returns:
        1 if a finished epoch is not exact or any row occurs too often, else 0.
    """
    recorded = list(epochs(output))
    for epoch in recorded:
        print(epoch.describe())
    return int(any(epoch.too_often or not (epoch.exact or epoch is recorded[-1]) for epoch in recorded))
