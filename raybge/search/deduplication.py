"""Which texts of the pool come first, and which positives other rows name for the same query: by hashes, on Ray.

What is found is kept in the store, so that a second start reads it. A process holds 16 bytes for each passage of
its part of the hashes, and as many again to sort them; the driver a few numbers for each block.

Letters in array names: P passages, B blocks, Q queries, K keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from raybge.cluster.shuffle import PARTS, exchange, in_groups
from raybge.data.groups import Group, text_key
from raybge.data.jsonl import Block, Parse, Row, scan
from raybge.data.source_files import SourceFile
from raybge.data.survey import Survey, fingerprint
from raybge.search.shards import words_of
from raybge.search.store import Store, digest
from raybge.util.versions import RAYBGE

LEAST_BLOCKS = 32  # blocks that one task hashes
PART_BYTES = 1 << 30  # of the input, for each part of the hashes
MOST_KNOWN = 1000  # positives of one query in the whole file, so that a query repeated without end stays small

Texts = Callable[[Any], Sequence[str]]


@dataclass(frozen=True)
class BlockGroup:
    """Consecutive blocks, and the name under which the store keeps what is found of them."""

    name: str
    blocks: list[tuple[SourceFile, Block]]


@dataclass(frozen=True)
class Kept:
    """Which passages of the pool come first of their text; `found_B` and `kept_B` count all and these, by block."""

    store: Store
    groups: list[BlockGroup]
    found_B: np.ndarray
    kept_B: np.ndarray

    @property
    def passages(self) -> int:
        return int(self.kept_B.sum())

    @property
    def dropped(self) -> int:
        return int(self.found_B.sum()) - self.passages

    def reader(self, block: int) -> Callable[[], np.ndarray]:
        """What reads keep_P of one block: true where a passage comes first."""
        size = len(self.groups[0].blocks)
        first = block // size * size
        start = int(self.found_B[first:block].sum())
        return partial(_keep_of, self.store, self.groups[block // size].name, start, start + int(self.found_B[block]))


def _keep_of(store: Store, name: str, start: int, stop: int) -> np.ndarray:
    return store.arrays(name)["keep_P"][start:stop]


def _groups(survey: Survey, *what: object) -> tuple[list[BlockGroup], int]:
    """The blocks of a survey in groups, and how many parts their hashes come in."""
    base = digest(
        RAYBGE, *what, [fingerprint(file) for file in survey.files], [(b.file, b.start) for b in survey.blocks]
    )
    blocks = [(survey.files[block.file], block) for block in survey.blocks]
    groups = [
        BlockGroup(digest(base, number), list(part)) for number, part in enumerate(in_groups(blocks, LEAST_BLOCKS))
    ]
    return groups, min(PARTS, 1 + sum(file.size for file in survey.files) // PART_BYTES)


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


# --- passages ---------------------------------------------------------------------------------------------


def deduplicate(
    survey: Survey, parse: Parse, texts: Texts, store: Store, key: Callable[[str], bytes] = text_key
) -> Kept:
    """Find the first passage of each key, by default its text's 16-byte content hash. Ray must be connected."""
    groups, parts = _groups(survey, "kept", _name(parse), _name(texts), _name(key))
    if all(store.has(group.name) for group in groups):
        found = [store.arrays(group.name, "found_B", "kept_B") for group in groups]
        counts = [(each["found_B"], each["kept_B"]) for each in found]
    else:
        counts = exchange(groups, parts, partial(_split_keys, parse, texts, key), _first_in_part, partial(_keep, store))
    return Kept(store, groups, *(np.concatenate(each) for each in zip(*counts, strict=True)))


def _split_keys(
    parse: Parse, texts: Texts, key: Callable[[str], bytes], group: BlockGroup, parts: int
) -> tuple[Any, list[np.ndarray]]:
    found: list[int] = []
    keys: list[bytes] = []
    for file, block in group.blocks:
        before = len(keys)
        for row, _ in scan(file, block, parse):
            if isinstance(row, Row):
                keys += [key(text) for text in texts(row.value)]
        found.append(len(keys) - before)
    keys_P2 = words_of(keys)
    part_P = keys_P2[:, 0] % parts
    return (np.array(found, np.int64), part_P), [keys_P2[part_P == part] for part in range(parts)]


def _first_in_part(keys: list[np.ndarray]) -> list[np.ndarray]:
    return np.split(first_of_each(np.concatenate(keys)), np.cumsum([len(each) for each in keys])[:-1])


def first_of_each(keys_P2: np.ndarray) -> np.ndarray:
    """keep_P: true for the first row of each distinct key."""
    order_P = np.lexsort((keys_P2[:, 1], keys_P2[:, 0]))  # stable: among equals the first comes first
    differs_P = np.ones(len(keys_P2), bool)
    differs_P[1:] = (keys_P2[order_P[1:]] != keys_P2[order_P[:-1]]).any(axis=1)
    keep_P = np.zeros(len(keys_P2), bool)
    keep_P[order_P[differs_P]] = True
    return keep_P


def _keep(store: Store, group: BlockGroup, own: Any, parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    found_B, part_P = own
    keep_P = np.zeros(len(part_P), bool)
    for part, keep in enumerate(parts):
        keep_P[part_P == part] = keep
    ends_B = np.cumsum(found_B)
    kept_B = np.diff(np.concatenate([[0], np.cumsum(keep_P)])[np.concatenate([[0], ends_B])])
    store.write_arrays(group.name, keep_P=keep_P, found_B=found_B, kept_B=kept_B)
    return found_B, kept_B


# --- queries ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Elsewhere:
    """Keys of the positives that a row's query has in other rows; of `cut` rows only MOST_KNOWN are kept."""

    store: Store
    groups: list[BlockGroup]
    rows_B: np.ndarray
    cut: int

    def reader(self, block: int) -> Callable[[], list[np.ndarray]]:
        """What reads the keys, (K, 2) for each row of one block."""
        size = len(self.groups[0].blocks)
        first = block // size * size
        start = int(self.rows_B[first:block].sum())
        return partial(_keys_of, self.store, self.groups[block // size].name, start, int(self.rows_B[block]))


def _keys_of(store: Store, name: str, start: int, rows: int) -> list[np.ndarray]:
    found = store.arrays(name)
    edges = np.searchsorted(found["row_K"], np.arange(start, start + rows + 1))
    return [found["key_K2"][a:b] for a, b in itertools.pairwise(edges)]


def positives_elsewhere(survey: Survey, parse: Parse, key: Callable[[str], bytes], store: Store) -> Elsewhere:
    """For rows that share their query: the positives of all of them. `key` says which texts count as equal."""
    groups, parts = _groups(survey, "elsewhere", _name(parse), _name(key))
    if all(store.has(group.name) for group in groups):
        cut = [int(store.arrays(group.name, "cut")["cut"]) for group in groups]
    else:
        split = partial(_split_queries, parse, key)
        cut = exchange(groups, parts, split, _shared_in_part, partial(_keep_shared, store))
    return Elsewhere(store, groups, survey.rows, sum(cut))


def _split_queries(parse: Parse, key: Callable[[str], bytes], group: BlockGroup, parts: int) -> tuple[Any, list[Any]]:
    queries: list[bytes] = []
    positives: list[list[bytes]] = []
    for file, block in group.blocks:
        for row, _ in scan(file, block, parse):
            if isinstance(row, Row):
                found: Group = row.value
                queries.append(key(found.query))
                positives.append([key(text) for text in found.pos])
    query_Q2 = words_of(queries)
    part_Q = query_Q2[:, 0] % parts
    values = []
    for part in range(parts):
        rows = np.flatnonzero(part_Q == part)
        mine = [positives[row] for row in rows]
        values.append((query_Q2[rows], [len(each) for each in mine], words_of([k for each in mine for k in each])))
    return part_Q, values


def _shared_in_part(values: list[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each group (row_K, key_K2): rows, numbered within the group's share of this part, and a key for each."""
    query_Q2 = np.concatenate([queries for queries, _, _ in values])
    count_Q = np.concatenate([np.array(counts, np.int64) for _, counts, _ in values])
    key_K2 = np.concatenate([keys for _, _, keys in values])
    end_Q = np.cumsum(count_Q)
    order_Q = np.lexsort((query_Q2[:, 1], query_Q2[:, 0]))
    sorted_Q2 = query_Q2[order_Q]
    starts = np.flatnonzero(np.concatenate([[True], (sorted_Q2[1:] != sorted_Q2[:-1]).any(axis=1)]))
    stops = np.append(starts[1:], len(order_Q))
    rows: list[np.ndarray] = [np.zeros(0, np.int64)]
    keys: list[np.ndarray] = [np.zeros((0, 2), np.uint64)]
    for run in np.flatnonzero(stops - starts > 1):
        shared = np.sort(order_Q[starts[run] : stops[run]])
        known = np.concatenate([key_K2[end_Q[q] - count_Q[q] : end_Q[q]] for q in shared])
        known = np.unique(known, axis=0)[:MOST_KNOWN]
        rows.append(np.repeat(shared, len(known)))
        keys.append(np.tile(known, (len(shared), 1)))
    row_K, key_K2 = np.concatenate(rows), np.concatenate(keys)
    order_K = np.argsort(row_K, kind="stable")
    row_K, key_K2 = row_K[order_K], key_K2[order_K]
    edges = np.cumsum([0] + [len(queries) for queries, _, _ in values])
    cuts = np.searchsorted(row_K, edges)
    return [(row_K[a:b] - edge, key_K2[a:b]) for a, b, edge in zip(cuts[:-1], cuts[1:], edges[:-1], strict=True)]


def _keep_shared(store: Store, group: BlockGroup, part_Q: np.ndarray, parts: list[Any]) -> int:
    rows = [np.flatnonzero(part_Q == part)[row_K] for part, (row_K, _) in enumerate(parts)]
    row_K, key_K2 = np.concatenate(rows), np.concatenate([keys for _, keys in parts])
    order_K = np.argsort(row_K, kind="stable")
    cut = int((np.bincount(row_K) >= MOST_KNOWN).sum())
    store.write_arrays(group.name, row_K=row_K[order_K], key_K2=key_K2[order_K], cut=np.array(cut))
    return cut
