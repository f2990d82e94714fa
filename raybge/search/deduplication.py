"""Deduplication of the pool, and positives that several rows of one query share: by hashes, shuffled on Ray.

Results are kept in the store, so that a second start reads them. A process holds 16 bytes per passage of its partition
of the hashes (32 if passages have ids), and as many again to sort them; the driver holds a few numbers per block.

Letters in array names: P passages, B blocks, Q queries, K keys, C conflicts.
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
from raybge.data.survey import Survey, file_fingerprint
from raybge.search.key_table import key_words
from raybge.search.store import Store
from raybge.util.digest import digest
from raybge.util.versions import RAYBGE

MIN_BLOCKS = 32  # blocks that one task hashes
PARTITION_BYTES = 1 << 30  # input bytes per partition of the hashes
MAX_CONFLICTS = 10  # conflicts of a group of blocks that are located; others are only counted
MAX_SHARED_POSITIVES = 1000  # positives of one query in the whole file: bounds the memory for a query of endless rows

Key = Callable[[str], bytes]
TextsOfRow = Callable[[Any], Sequence[str]]


@dataclass(frozen=True)
class BlockGroup:
    """Consecutive blocks of a survey, and the name of their results in the store."""

    name: str
    blocks: list[tuple[SourceFile, Block]]


def _groups(survey: Survey, *identity: object) -> tuple[list[BlockGroup], int]:
    """Return the blocks of a survey in groups, and the number of partitions of their hashes."""
    base = digest(
        RAYBGE, *identity, [file_fingerprint(file) for file in survey.files], [(b.file, b.start) for b in survey.blocks]
    )
    blocks = [(survey.files[block.file], block) for block in survey.blocks]
    groups = [BlockGroup(digest(base, number), list(part)) for number, part in enumerate(in_groups(blocks, MIN_BLOCKS))]
    return groups, min(PARTS, 1 + sum(file.size for file in survey.files) // PARTITION_BYTES)


def _qualified_name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


# --- passages ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UniquePassages:
    """First passage of each distinct text of a pool.

    Args:
        store: holds a flag per passage.
        groups: the blocks.
        total_B: passages of each block.
        unique_B: first occurrences in each block.
        conflicts: the first passages whose key an earlier passage has with another text, each as (group, number of the
            passage in the group, the earlier passage's group and number).
        conflict_count: number of all such passages.
    """

    store: Store
    groups: list[BlockGroup]
    total_B: np.ndarray
    unique_B: np.ndarray
    conflicts: Sequence[tuple[int, int, int, int]] = ()
    conflict_count: int = 0

    @property
    def passages(self) -> int:
        """Number of distinct passages."""
        return int(self.unique_B.sum())

    @property
    def duplicates(self) -> int:
        """Number of dropped passages."""
        return int(self.total_B.sum()) - self.passages

    def locate(self, group: int, number: int) -> tuple[int, int]:
        """Return the block of a group's passage, and the passage's number in it."""
        first = group * len(self.groups[0].blocks)
        end_B = np.cumsum(self.total_B[first : first + len(self.groups[group].blocks)])
        block = int(np.searchsorted(end_B, number, side="right"))
        return first + block, number - int(end_B[block] - self.total_B[first + block])

    def reader(self, block: int) -> Callable[[], np.ndarray]:
        """Return a function that reads first_P of one block: true for the first passage of its text."""
        size = len(self.groups[0].blocks)
        first = block // size * size
        start = int(self.total_B[first:block].sum())
        stop = start + int(self.total_B[block])
        return partial(_read_first, self.store, self.groups[block // size].name, start, stop)


def _read_first(store: Store, name: str, start: int, stop: int) -> np.ndarray:
    return store.arrays(name)["first_P"][start:stop]


def deduplicate(
    survey: Survey,
    parse: Parse,
    texts: TextsOfRow,
    store: Store,
    key: Key = text_key,
    compare_texts: bool = False,
) -> UniquePassages:
    """Find the first passage of each key. Ray must be connected.

    Args:
        survey: blocks of the pool.
        parse: parser of a row.
        texts: returns the passages of a parsed row.
        store: keeps the result.
        key: hash of a passage, 16 bytes; the default is that of its text.
        compare_texts: also find the passages that have the key of an earlier one, but another text.

    Returns:
        The first passages.
    """
    names = map(_qualified_name, (parse, texts, key))
    groups, parts = _groups(survey, "unique", *names, compare_texts)
    if all(store.has(group.name) for group in groups):
        arrays = [store.arrays(group.name, "total_B", "unique_B", "conflict_C3", "conflicts") for group in groups]
        results = [tuple(each.values()) for each in arrays]
    else:
        split = partial(_split_keys, parse, texts, key, compare_texts)
        results = exchange(groups, parts, split, _first_in_partition, partial(_write_first, store))
    total, unique, conflict_C3, counts = zip(*results, strict=True)
    conflicts = [(group, *conflict) for group, each in enumerate(conflict_C3) for conflict in each.tolist()]
    return UniquePassages(store, groups, np.concatenate(total), np.concatenate(unique), conflicts, int(sum(counts)))


def _split_keys(
    parse: Parse, texts: TextsOfRow, key: Key, compare_texts: bool, group: BlockGroup, parts: int
) -> tuple[Any, list[np.ndarray]]:
    """Return (passages of each block, partition of each passage), and the keys of each partition.

    To compare texts, a key is followed by 8 bytes of the text's hash and by the passage's number in the group.
    """
    totals: list[int] = []
    keys: list[bytes] = []
    hashes: list[bytes] = []
    for file, block in group.blocks:
        before = len(keys)
        for row, _ in scan(file, block, parse):
            if isinstance(row, Row):
                passages = texts(row.value)
                keys += [key(text) for text in passages]
                hashes += [text_key(text) for text in passages] if compare_texts else []
        totals.append(len(keys) - before)
    keys_PW = key_words(keys)
    part_P = keys_PW[:, 0] % parts
    if compare_texts:
        keys_PW = np.column_stack([keys_PW, key_words(hashes)[:, 0], np.arange(len(keys), dtype=np.uint64)])
    return (np.array(totals, np.int64), part_P), [keys_PW[part_P == part] for part in range(parts)]


def _first_in_partition(keys: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (first_P, conflict_C3) of each group; a conflict is (number, the earlier passage's group and number)."""
    keys_PW = np.concatenate(keys)
    ends = np.cumsum([len(each) for each in keys])
    earlier_P = first_rows(keys_PW[:, :2])
    first_P = earlier_P == np.arange(len(keys_PW))
    conflict_C = np.zeros(0, np.int64)
    if keys_PW.shape[1] > 2:
        conflict_C = np.flatnonzero(keys_PW[:, 2] != keys_PW[earlier_P, 2])
    earlier_C = earlier_P[conflict_C]
    numbers = [keys_PW[conflict_C, -1], np.searchsorted(ends, earlier_C, side="right"), keys_PW[earlier_C, -1]]
    conflict_C3 = np.column_stack(numbers).astype(np.int64)
    conflicts = np.split(conflict_C3, np.searchsorted(conflict_C, ends[:-1]))
    return list(zip(np.split(first_P, ends[:-1]), conflicts, strict=True))


def first_rows(keys_P2: np.ndarray) -> np.ndarray:
    """Return the first row with the key of each row, (P,) int64."""
    order_P = np.lexsort((keys_P2[:, 1], keys_P2[:, 0]))  # stable: the first of equal keys stays first
    differs_P = np.ones(len(keys_P2), bool)
    differs_P[1:] = (keys_P2[order_P[1:]] != keys_P2[order_P[:-1]]).any(axis=1)
    rows_P = np.empty(len(keys_P2), np.int64)
    rows_P[order_P] = order_P[differs_P][np.cumsum(differs_P) - 1]
    return rows_P


def first_of_each(keys_P2: np.ndarray) -> np.ndarray:
    """Return first_P: true for the first row of each distinct key."""
    first_P: np.ndarray = first_rows(keys_P2) == np.arange(len(keys_P2))
    return first_P


def _write_first(
    store: Store, group: BlockGroup, counts: Any, parts: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    total_B, part_P = counts
    first_P = np.zeros(len(part_P), bool)
    for part, (first, _) in enumerate(parts):
        first_P[part_P == part] = first
    ends_B = np.cumsum(total_B)
    unique_B = np.diff(np.concatenate([[0], np.cumsum(first_P)])[np.concatenate([[0], ends_B])])
    conflict_C3 = np.concatenate([conflicts for _, conflicts in parts])
    count = np.array(len(conflict_C3))
    conflict_C3 = conflict_C3[np.argsort(conflict_C3[:, 0])][:MAX_CONFLICTS]
    arrays = {"total_B": total_B, "unique_B": unique_B, "conflict_C3": conflict_C3, "conflicts": count}
    store.write_arrays(group.name, first_P=first_P, **arrays)
    return total_B, unique_B, conflict_C3, count


# --- queries ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedPositives:
    """Keys of the positives that other rows state for the same query.

    Args:
        store: holds the keys.
        groups: the blocks.
        rows_B: rows of each block.
        truncated_rows: rows of which only MAX_SHARED_POSITIVES keys are kept.
    """

    store: Store
    groups: list[BlockGroup]
    rows_B: np.ndarray
    truncated_rows: int

    def reader(self, block: int) -> Callable[[], list[np.ndarray]]:
        """Return a function that reads the keys, (K, 2) for each row of one block."""
        size = len(self.groups[0].blocks)
        first = block // size * size
        start = int(self.rows_B[first:block].sum())
        return partial(_read_keys, self.store, self.groups[block // size].name, start, int(self.rows_B[block]))


def _read_keys(store: Store, name: str, start: int, rows: int) -> list[np.ndarray]:
    arrays = store.arrays(name)
    edges = np.searchsorted(arrays["row_K"], np.arange(start, start + rows + 1))
    return [arrays["key_K2"][a:b] for a, b in itertools.pairwise(edges)]


def find_shared_positives(survey: Survey, parse: Parse, key: Key, store: Store) -> SharedPositives:
    """Collect, for rows that share their query, the positives of all of them. Ray must be connected.

    Args:
        survey: blocks of groups.
        parse: parser of a row, to a Group.
        key: hash of a text; texts with equal keys count as equal.
        store: keeps the result.

    Returns:
        Keys of the positives.
    """
    groups, parts = _groups(survey, "shared positives", _qualified_name(parse), _qualified_name(key))
    if all(store.has(group.name) for group in groups):
        truncated = [int(store.arrays(group.name, "truncated")["truncated"]) for group in groups]
    else:
        split = partial(_split_queries, parse, key)
        truncated = exchange(groups, parts, split, _shared_in_partition, partial(_write_shared, store))
    return SharedPositives(store, groups, survey.rows, sum(truncated))


def _split_queries(parse: Parse, key: Key, group: BlockGroup, parts: int) -> tuple[Any, list[Any]]:
    """Return the partition of each query, and (query keys, numbers of positives, their keys) of each partition."""
    queries: list[bytes] = []
    positives: list[list[bytes]] = []
    for file, block in group.blocks:
        for row, _ in scan(file, block, parse):
            if isinstance(row, Row):
                value: Group = row.value
                queries.append(key(value.query))
                positives.append([key(text) for text in value.pos])
    query_Q2 = key_words(queries)
    part_Q = query_Q2[:, 0] % parts
    values = []
    for part in range(parts):
        rows = np.flatnonzero(part_Q == part)
        keys = [positives[row] for row in rows]
        values.append((query_Q2[rows], [len(each) for each in keys], key_words([k for each in keys for k in each])))
    return part_Q, values


def _shared_in_partition(values: list[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (row_K, key_K2) of each group: rows, numbered within the group's share of this partition, and keys."""
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
        same_query = np.sort(order_Q[starts[run] : stops[run]])
        positives = np.concatenate([key_K2[end_Q[q] - count_Q[q] : end_Q[q]] for q in same_query])
        positives = np.unique(positives, axis=0)[:MAX_SHARED_POSITIVES]
        rows.append(np.repeat(same_query, len(positives)))
        keys.append(np.tile(positives, (len(same_query), 1)))
    row_K, key_K2 = np.concatenate(rows), np.concatenate(keys)
    order_K = np.argsort(row_K, kind="stable")
    row_K, key_K2 = row_K[order_K], key_K2[order_K]
    edges = np.cumsum([0] + [len(queries) for queries, _, _ in values])
    cuts = np.searchsorted(row_K, edges)
    return [(row_K[a:b] - edge, key_K2[a:b]) for a, b, edge in zip(cuts[:-1], cuts[1:], edges[:-1], strict=True)]


def _write_shared(store: Store, group: BlockGroup, part_Q: np.ndarray, parts: list[Any]) -> int:
    rows = [np.flatnonzero(part_Q == part)[row_K] for part, (row_K, _) in enumerate(parts)]
    row_K, key_K2 = np.concatenate(rows), np.concatenate([keys for _, keys in parts])
    order_K = np.argsort(row_K, kind="stable")
    truncated = int((np.bincount(row_K) >= MAX_SHARED_POSITIVES).sum())
    store.write_arrays(group.name, row_K=row_K[order_K], key_K2=key_K2[order_K], truncated=np.array(truncated))
    return truncated
