"""Split of the training data into training and held-out groups, for a search without evaluation data of its own."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raybge.data.groups import Group, near_key, parse_group
from raybge.data.jsonl import Row, scan
from raybge.data.survey import Survey, file_fingerprint
from raybge.util.atomic_write import atomic_folder
from raybge.util.errors import UserError

BLOCK_BYTES = 1 << 20
FILES = TRAIN, DEV, CORPUS = "train.jsonl", "dev.jsonl", "corpus.jsonl"
COUNTS = "counts.json"


@dataclass(frozen=True)
class HeldOutSplit:
    """Files of a split.

    Args:
        train: path of the groups to train on.
        dev: path of the held-out groups.
        corpus: path of the passages of all groups.
        trained: number of groups to train on.
        held_out: number of held-out groups.
    """

    train: str
    dev: str
    corpus: str
    trained: int
    held_out: int


def split_held_out(survey: Survey, share: float, seed: int, folder: Path) -> HeldOutSplit:
    """Split groups by a seeded hash of the query, so that all groups of one query are on the same side.

    An existing split of the same data, share and seed is reused. Memory: 8 bytes per row.

    Args:
        survey: the surveyed groups.
        share: share of the groups that is held out, at least.
        seed: seed of the hash.
        folder: parent of the split's folder.

    Returns:
        The files and the number of groups in them.

    Raises:
        UserError: nothing would remain to train on.
    """
    key = [*map(file_fingerprint, survey.files)], share, seed
    name = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
    split = folder / f"held-out-{name}"
    if not (split / COUNTS).is_file():
        with atomic_folder(str(split), "--storage_path") as partial:
            _write(survey, share, seed, Path(partial))
    counts = json.loads((split / COUNTS).read_text())
    train, dev, corpus = (str(split / each) for each in FILES)
    return HeldOutSplit(train, dev, corpus, **counts)


def _write(survey: Survey, share: float, seed: int, folder: Path) -> None:
    counts = {"trained": 0, "held_out": 0}
    hash_N = np.fromiter((_hash(group.query, seed) for group, _ in _groups(survey)), np.uint64)
    threshold = np.sort(hash_N)[max(math.ceil(share * len(hash_N)), 1) - 1] if len(hash_N) else 0
    with open(folder / TRAIN, "w") as train, open(folder / DEV, "w") as dev, open(folder / CORPUS, "w") as corpus:
        for group, text in _groups(survey):
            is_held_out = _hash(group.query, seed) <= threshold
            counts["held_out" if is_held_out else "trained"] += 1
            (dev if is_held_out else train).write(text + "\n")
            corpus.writelines(json.dumps({"text": each}) + "\n" for each in group.pos + group.neg)
    if not counts["trained"]:
        raise UserError(
            f"--held_out {share:g} of {len(hash_N):,} groups leaves nothing to train on; lower --held_out, or give "
            "--eval_data"
        )
    (folder / COUNTS).write_text(json.dumps(counts))


def _groups(survey: Survey) -> Iterator[tuple[Group, str]]:
    """Yield each group with its row as JSON."""
    for block in survey.blocks:
        for row, text in scan(survey.files[block.file], block, parse_group):
            if isinstance(row, Row):
                yield row.value, text


def _hash(query: str, seed: int) -> int:
    """Return a hash that ignores case and whitespace of the query."""
    return int.from_bytes(
        hashlib.blake2b(near_key(query), digest_size=8, salt=seed.to_bytes(8, "little")).digest(), "little"
    )
