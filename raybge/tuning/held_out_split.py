"""Groups held out of the training data, for a search without evaluation data of its own."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raybge.data.groups import Group, near_key, parse_group
from raybge.data.jsonl import Row, scan
from raybge.data.survey import Survey, fingerprint
from raybge.util.errors import UserError

BLOCK_BYTES = 1 << 20
FILES = TRAIN, DEV, CORPUS = "train.jsonl", "dev.jsonl", "corpus.jsonl"


@dataclass(frozen=True)
class Split:
    """Three files of a folder: groups to train on, groups held out, and the passages of all of them."""

    train: str
    dev: str
    corpus: str
    trained: int
    held_out: int


def hold_out(found: Survey, share: float, seed: int, place: Path) -> Split:
    """Deal the groups to two files, by a seeded hash of the query: a query that comes twice is on one side.

    At least `share` of the groups are held out. The files lie in a folder of `place` whose name follows from data,
    share and seed; what is there already is used. Memory: 8 bytes a row.
    UserError where nothing would be left to train on.
    """
    about = [*map(fingerprint, found.files)], share, seed
    name = hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()
    folder = place / f"held-out-{name}"
    if not (folder / "counts.json").is_file():
        aside = place / f"{folder.name}.{uuid.uuid4().hex}.tmp"
        aside.mkdir(parents=True)
        try:
            _write(found, share, seed, aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    counts = json.loads((folder / "counts.json").read_text())
    train, dev, corpus = (str(folder / each) for each in FILES)
    return Split(train, dev, corpus, **counts)


def _write(found: Survey, share: float, seed: int, folder: Path) -> None:
    counts = {"trained": 0, "held_out": 0}
    hash_N = np.fromiter((_hash(group.query, seed) for group, _ in _groups(found)), np.uint64)
    last = np.sort(hash_N)[max(math.ceil(share * len(hash_N)), 1) - 1] if len(hash_N) else 0
    with open(folder / TRAIN, "w") as train, open(folder / DEV, "w") as dev, open(folder / CORPUS, "w") as corpus:
        for group, text in _groups(found):
            held = _hash(group.query, seed) <= last
            counts["held_out" if held else "trained"] += 1
            (dev if held else train).write(text + "\n")
            corpus.writelines(json.dumps({"text": each}) + "\n" for each in group.pos + group.neg)
    if not counts["trained"]:
        raise UserError(
            f"--held_out {share:g} of {len(hash_N):,} groups leaves nothing to train on; give --eval_data, or less"
        )
    (folder / "counts.json").write_text(json.dumps(counts))


def _groups(found: Survey) -> Iterator[tuple[Group, str]]:
    """Each group with its row as JSON."""
    for block in found.blocks:
        for row, text in scan(found.files[block.file], block, parse_group):
            if isinstance(row, Row):
                yield row.value, text


def _hash(query: str, seed: int) -> int:
    """Equal for queries that differ in case and space alone."""
    return int.from_bytes(
        hashlib.blake2b(near_key(query), digest_size=8, salt=seed.to_bytes(8, "little")).digest(), "little"
    )
