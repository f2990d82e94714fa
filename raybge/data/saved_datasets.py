"""Folders that `save_to_disk` of the library datasets has written.

A Dataset is a folder of Arrow files, named in order by its state.json; a DatasetDict has such a folder for each split,
named by its dataset_dict.json.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from typing import Any

import pyarrow.fs as pafs

from raybge.util.errors import UserError

_STATE, SPLITS = "state.json", "dataset_dict.json"


def saved_files(store: pafs.FileSystem, root: str, paths: Sequence[str], subject: str) -> dict[str, int]:
    """Return the Arrow files of the data sets that `save_to_disk` has written into a folder or below it.

    Args:
        store: file system of the folder.
        root: the folder.
        paths: all files below it, relative to it.
        subject: beginning of an error message: flag and folder.

    Returns:
        For the relative path of each file its position in its data set.

    Raises:
        UserError: a file of a data set is missing, its state cannot be read, or the folder has several splits.
    """
    splits = _read(store, f"{root}/{SPLITS}", subject).get("splits", []) if SPLITS in paths else []
    if len(splits) > 1:
        names = " or ".join(f"{posixpath.basename(root)}/{split}" for split in splits)
        raise UserError(f"{subject} is a DatasetDict of datasets.save_to_disk: name one of its splits, {names}")
    known = set(paths)
    positions: dict[str, int] = {}
    for state in (path for path in paths if posixpath.basename(path) == _STATE):
        folder = posixpath.dirname(state)
        content = _read(store, f"{root}/{state}", subject)
        files = content.get("_data_files")
        if not isinstance(files, list) or not all(isinstance(file, dict) and "filename" in file for file in files):
            continue  # of another program
        if content.get("_indices_data_files"):
            raise UserError(
                f"{subject}: {state} names a selection of rows, as old versions of datasets wrote it: save the data "
                "again with a current version"
            )
        for position, file in enumerate(files):
            path = posixpath.join(folder, str(file["filename"]))
            if path not in known:
                raise UserError(f"{subject}: {path} is missing, which {state} of datasets.save_to_disk names")
            positions[path] = position
    return positions


def _read(store: pafs.FileSystem, path: str, subject: str) -> dict[str, Any]:
    with store.open_input_stream(path) as stream:
        content = stream.read()
    try:
        value = json.loads(content)
    except ValueError as err:
        raise UserError(f"{subject}: {path} is not JSON ({err})") from err
    return value if isinstance(value, dict) else {}
