"""A run's data sets: which files they are, which rows of them are used, how often, and in whose company.

Each file is a data set. Where a folder was named, its files of fewer rows than `small_threshold` are joined into one
data set, which is left out when it has fewer than `drop_threshold`. A file that was named by itself stays, whatever its
size: nothing that a person asks for by name is dropped. Both thresholds act with and without
`same_dataset_within_batch`, since they say what the data sets are.

Where the name of a file (up to its first dot), the folder it lies in or the folder that was named ends in
`no_in_batch_neg`, its queries see their own group only.
"""

from __future__ import annotations

import difflib
import math
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raybge.data.mixture import Mixture
from raybge.data.order import Order
from raybge.data.source_files import SourceFile
from raybge.data.survey import Survey
from raybge.util.errors import UserError
from raybge.util.redaction import redact

ALONE = "no_in_batch_neg"
MAX_WEIGHT = 100.0


@dataclass(frozen=True)
class DataSet:
    """`name` is what the run prints, `files` are indices into the survey's, `rows` those that are used. `small`: made
    of a folder's small files.
    """

    name: str
    files: tuple[int, ...]
    rows: int
    small: bool


@dataclass(frozen=True)
class DataSets:
    """The data sets of a run and those that were left out; `alone`: files whose queries see their own group only."""

    kept: tuple[DataSet, ...]
    left_out: tuple[DataSet, ...]
    alone: frozenset[int]
    mixture: Mixture

    def describe(self, survey: Survey, order: Order) -> list[str]:
        """What a person should see of them: a line each where there are several, or one that is not simply used."""
        mixture, lines = self.mixture, []
        rows_F = np.bincount(mixture.file_B, survey.rows, len(survey.files)).astype(np.int64)
        short = {pool for pool, steps in enumerate(order.steps_D) if not steps}
        for one in self.kept:
            members = list(one.files)
            rows, epoch = int(rows_F[members].sum()), int(mixture.total_F[members].sum())
            notes = [f"{one.rows:,} of {rows:,} rows"] * (one.rows < rows)
            notes += [f"{epoch:,} an epoch"] * (epoch != one.rows)
            notes += ["own negatives only"] * (self.alone >= set(members))
            if mixture.pool_F[members[0]] in short:
                notes.append(f"left out by --dataloader_drop_last: less than a global batch of {order.global_batch:,}")
            if notes or len(self.kept) + len(self.left_out) > 1:
                lines.append(f"  {one.name}: {'; '.join([f'{one.rows:,} groups', *notes])}")
        return lines + [f"  left out by --drop_threshold: {one.name}: {one.rows:,} groups" for one in self.left_out]


def build_data_sets(
    survey: Survey,
    max_examples: int,
    small_threshold: int = 0,
    drop_threshold: int = 0,
    weights: Mapping[str, float] | None = None,
    together: bool = False,
) -> DataSets:
    """The data sets of the files that were surveyed.

    Args:
        max_examples: rows used of each file; of a larger one a sample, from all its parts, the same in every epoch.
        small_threshold, drop_threshold: see above; rows that are used are what counts.
        weights: how often an epoch has each row, by file or by folder named; the file's own counts first.
        together: a step takes its rows from one data set.

    Raises UserError for a weight of what is no data set, and where every data set is left out.
    """
    files = survey.files
    file_B = np.array([block.file for block in survey.blocks], np.int64)
    used_F = np.minimum(np.bincount(file_B, survey.rows, len(files)).astype(np.int64), max_examples)
    sets = _sets(files, used_F, small_threshold)
    left_out = [one for one in sets if one.small and one.rows < drop_threshold]
    kept = [one for one in sets if one not in left_out]
    if not kept:
        raise UserError(f"--drop_threshold {drop_threshold} leaves out all of --train_data: {_listed(left_out)}")
    pool_F = np.full(len(files), -1, np.int64)
    for pool, one in enumerate(kept):
        pool_F[list(one.files)] = pool if together else 0
    weight_F = np.array(_weights(files, weights or {}), float)
    alone = frozenset(i for i, file in enumerate(files) if _sees_own_group_only(file))
    return DataSets(tuple(kept), tuple(left_out), alone, Mixture(file_B, used_F, weight_F, pool_F))


def parse_weights(given: Sequence[str]) -> dict[str, float]:
    """The weights of NAME=WEIGHT ...; UserError for one that is not written so, or not above 0 and at most 100."""
    weights: dict[str, float] = {}
    for text in given:
        name, mark, value = text.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not (name and mark and 0 < weight <= MAX_WEIGHT):
            raise UserError(
                f"--dataset_weights {text}: expected NAME=WEIGHT with a number above 0 and at most {MAX_WEIGHT:g}"
            )
        if name in weights:
            raise UserError(f"--dataset_weights names {name} twice")
        weights[name] = weight
    return weights


def _sets(files: Sequence[SourceFile], used_F: np.ndarray, small_threshold: int) -> list[DataSet]:
    """Every data set, in the order of its first file."""
    sets: dict[tuple[str, int], list[int]] = {}
    for i, file in enumerate(files):
        small = file.folder and used_F[i] < small_threshold
        if used_F[i]:
            sets.setdefault((file.folder, -1) if small else ("", i), []).append(i)
    found = []
    for (folder, one), members in sets.items():
        name = files[members[0]].name if len(members) == 1 else f"{_folder(folder)} ({len(members)} small files)"
        found.append(DataSet(name, tuple(members), int(used_F[members].sum()), small=one < 0))
    return found


def _weights(files: Sequence[SourceFile], given: Mapping[str, float]) -> list[float]:
    names = {file.name: file.name for file in files}
    names |= {_folder(file.folder): file.folder for file in files if file.folder}
    wanted = {}
    for asked, weight in given.items():
        name = redact(asked)  # as files are called
        known = name if name in names else _folder(name)
        if known not in names:
            tails = {posixpath.basename(each.rstrip("/")): each for each in names}
            close = difflib.get_close_matches(name, [*tails, *names], n=1)
            hint = f"; did you mean {tails.get(close[0], close[0])}?" if close else ""
            raise UserError(f"--dataset_weights: --train_data has no {name}{hint}")
        wanted[known] = weight
    return [wanted.get(file.name, wanted.get(_folder(file.folder), 1.0)) for file in files]


def _folder(name: str) -> str:
    """A folder's name as the run prints it."""
    return name.rstrip("/") + "/"


def _sees_own_group_only(file: SourceFile) -> bool:
    place, name = posixpath.split(file.name)
    names = (name.split(".")[0], posixpath.basename(place), posixpath.basename(file.folder.rstrip("/")))
    return any(each.endswith(ALONE) for each in names)


def _listed(sets: Sequence[DataSet]) -> str:
    return ", ".join(f"{one.name} ({one.rows:,} rows)" for one in sets)
