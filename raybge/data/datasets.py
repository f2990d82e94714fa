"""Data sets of a run: their files, the rows that are used, weights, and in-batch negatives.

Each file is a data set. In a folder that the user names, files with fewer rows than `small_threshold` are joined into
one data set, which is dropped if it has fewer rows than `drop_threshold`. A file that the user names is never dropped.
Both thresholds apply with and without `same_dataset_within_batch`, since they define the data sets.

If the name of a file (up to its first dot), of its folder or of the folder that the user named ends in
`no_in_batch_neg`, the file's queries are compared with their own group only.
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
    """One data set.

    Args:
        name: name for messages.
        files: indices into the survey's files.
        rows: rows that are used.
        small: the data set joins small files of a folder.
    """

    name: str
    files: tuple[int, ...]
    rows: int
    small: bool


@dataclass(frozen=True)
class DataSets:
    """Data sets of a run.

    Args:
        used: the data sets.
        dropped: data sets below `drop_threshold`.
        alone: files whose queries are compared with their own group only.
        mixture: rows per epoch of each file.
    """

    used: tuple[DataSet, ...]
    dropped: tuple[DataSet, ...]
    alone: frozenset[int]
    mixture: Mixture

    def describe(self, survey: Survey, order: Order) -> list[str]:
        """Return one line per data set if there are several, or if one is not simply used once per epoch.

        Args:
            survey: the surveyed files.
            order: order of the epochs.

        Returns:
            The lines.
        """
        mixture, lines = self.mixture, []
        rows_F = np.bincount(mixture.file_B, survey.rows, len(survey.files)).astype(np.int64)
        short = {pool for pool, steps in enumerate(order.steps_D) if not steps}
        for one in self.used:
            members = list(one.files)
            rows, epoch = int(rows_F[members].sum()), int(mixture.total_F[members].sum())
            notes = [f"{one.rows:,} of {rows:,} rows"] * (one.rows < rows)
            notes += [f"{epoch:,} per epoch"] * (epoch != one.rows)
            notes += ["own negatives only"] * (self.alone >= set(members))
            if mixture.pool_F[members[0]] in short:
                notes.append(f"dropped by --dataloader_drop_last: less than a global batch of {order.global_batch:,}")
            if notes or len(self.used) + len(self.dropped) > 1:
                lines.append(f"  {one.name}: {'; '.join([f'{one.rows:,} groups', *notes])}")
        return lines + [f"  dropped by --drop_threshold: {one.name}: {one.rows:,} groups" for one in self.dropped]


def build_data_sets(
    survey: Survey,
    max_examples: int,
    small_threshold: int = 0,
    drop_threshold: int = 0,
    weights: Mapping[str, float] | None = None,
    together: bool = False,
) -> DataSets:
    """Build the data sets of the surveyed files.

    Args:
        survey: the surveyed files.
        max_examples: most rows used of a file; of a larger file a sample from all its parts, the same in every epoch.
        small_threshold: used rows below which a file of a folder is small.
        drop_threshold: used rows below which a data set of small files is dropped.
        weights: how often an epoch has each row, by file or by folder; a weight of the file itself takes precedence.
        together: a step takes its rows from one data set.

    Returns:
        The data sets.

    Raises:
        UserError: a weight names no data set, or every data set is dropped.
    """
    files = survey.files
    file_B = np.array([block.file for block in survey.blocks], np.int64)
    used_F = np.minimum(np.bincount(file_B, survey.rows, len(files)).astype(np.int64), max_examples)
    sets = _sets(files, used_F, small_threshold)
    dropped = [one for one in sets if one.small and one.rows < drop_threshold]
    used = [one for one in sets if one not in dropped]
    if not used:
        raise UserError(f"--drop_threshold {drop_threshold} drops all of --train_data: {_list_sets(dropped)}")
    pool_F = np.full(len(files), -1, np.int64)
    for pool, one in enumerate(used):
        pool_F[list(one.files)] = pool if together else 0
    weight_F = np.array(_weights(files, weights or {}), float)
    alone = frozenset(i for i, file in enumerate(files) if _is_alone(file))
    return DataSets(tuple(used), tuple(dropped), alone, Mixture(file_B, used_F, weight_F, pool_F))


def parse_weights(texts: Sequence[str]) -> dict[str, float]:
    """Parse weights of the form NAME=WEIGHT.

    Raises UserError if a text has another form, its weight is not above 0 and at most 100, or a name occurs twice.
    """
    weights: dict[str, float] = {}
    for text in texts:
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
    """Return every data set, in the order of its first file."""
    sets: dict[tuple[str, int], list[int]] = {}
    for i, file in enumerate(files):
        small = file.folder and used_F[i] < small_threshold
        if used_F[i]:
            sets.setdefault((file.folder, -1) if small else ("", i), []).append(i)
    result = []
    for (folder, one), members in sets.items():
        name = files[members[0]].name if len(members) == 1 else f"{_folder(folder)} ({len(members)} small files)"
        result.append(DataSet(name, tuple(members), int(used_F[members].sum()), small=one < 0))
    return result


def _weights(files: Sequence[SourceFile], weights: Mapping[str, float]) -> list[float]:
    """Return the weight of each file."""
    names = {file.name: file.name for file in files}
    names |= {_folder(file.folder): file.folder for file in files if file.folder}
    by_name = {}
    for key, weight in weights.items():
        name = redact(key)  # names of files have no credentials
        known = name if name in names else _folder(name)
        if known not in names:
            tails = {posixpath.basename(each.rstrip("/")): each for each in names}
            close = difflib.get_close_matches(name, [*tails, *names], n=1)
            hint = f"; did you mean {tails.get(close[0], close[0])}?" if close else ""
            raise UserError(f"--dataset_weights: --train_data has no {name}{hint}")
        by_name[known] = weight
    return [by_name.get(file.name, by_name.get(_folder(file.folder), 1.0)) for file in files]


def _folder(name: str) -> str:
    """Return the name of a folder for messages."""
    return name.rstrip("/") + "/"


def _is_alone(file: SourceFile) -> bool:
    place, name = posixpath.split(file.name)
    names = (name.split(".")[0], posixpath.basename(place), posixpath.basename(file.folder.rstrip("/")))
    return any(each.endswith(ALONE) for each in names)


def _list_sets(sets: Sequence[DataSet]) -> str:
    return ", ".join(f"{one.name} ({one.rows:,} rows)" for one in sets)
