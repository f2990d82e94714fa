"""Rows sorted by cluster, and the order of an epoch in which the rows of a step are similar.

The clusters of a sequence form a chain in which neighbors are similar. An epoch shuffles the rows inside of each
cluster, rotates the chain by a random number of rows, cuts it into steps of a global batch, and shuffles the steps. So
a step is a random part of one cluster, or of neighbors in the chain where it crosses a border. All steps are full but
one, whatever the sizes of the clusters, and each row occurs once. Queries of one cluster have hard negatives in each
other's passages: TAS-B (https://arxiv.org/abs/2104.06967), B3 (https://arxiv.org/abs/2505.11293).

A row takes 8 bytes of a file that processes map into their memory: a window touches the pages of its own clusters.

Letters in array names: B blocks, C clusters of all sequences, N rows.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raybge.data.mixture import Mixture, RowSequence, generator
from raybge.util.digest import fingerprint

SORTED_ROWS = 1 << 20  # rows that are sorted at a time


@dataclass(frozen=True, eq=False)
class SimilarRows:
    """Rows by cluster.

    Args:
        path: .npy file of (block, number among the block's valid rows), uint32 (N, 2), cluster after cluster.
        starts_C: first row of each cluster in the file, and the number of rows at the end; the clusters of a sequence
            are adjacent.
        clusters: clusters of each sequence.
        digest: fingerprint of the clusters' rows; the path may differ between machines.
    """

    path: str
    starts_C: np.ndarray
    clusters: int
    digest: str

    def rows(self, position_N: np.ndarray, pool: int, seed: int, epoch: int) -> np.ndarray:
        """Return rows of the chain of an epoch.

        Args:
            position_N: positions in the chain of the sequence, from 0.
            pool: number of the sequence.
            seed: seed of the order.
            epoch: number of the epoch.

        Returns:
            (N, 2) int64: block, and number among its valid rows.
        """
        first, end = (int(self.starts_C[number * self.clusters]) for number in (pool, pool + 1))
        shift = int(generator("rotation", seed, epoch, pool).integers(max(end - first, 1)))
        place_N = first + (position_N + shift) % max(end - first, 1)
        cluster_N = np.searchsorted(self.starts_C, place_N, side="right") - 1
        file_N2 = np.load(self.path, mmap_mode="r")
        rows_N2 = np.empty((len(place_N), 2), np.int64)
        by_cluster = np.argsort(cluster_N, kind="stable")
        borders = np.flatnonzero(np.diff(cluster_N[by_cluster])) + 1
        for members in np.split(by_cluster, borders) if len(by_cluster) else []:
            # one permutation is in memory at a time
            cluster = int(cluster_N[members[0]])
            start, stop = self.starts_C[cluster : cluster + 2].tolist()
            shuffled = generator("cluster", seed, epoch, cluster).permutation(stop - start)
            rows_N2[members] = file_N2[start + shuffled[place_N[members] - start]]
        return rows_N2


def sort_by_cluster(
    path: str,
    labels: Callable[[int, int], np.ndarray],
    rows_B: np.ndarray,
    mixture: Mixture,
    clusters: int,
    seed: int,
) -> SimilarRows:
    """Sort the rows of an epoch by sequence and cluster into a file, a million at a time.

    Args:
        path: the file; it appears when it is complete.
        labels: returns the clusters of rows [start, stop) of the data, counted over all blocks.
        rows_B: valid rows of each block.
        mixture: the rows that are used, each once, and the sequence of each file.
        clusters: number of clusters.
        seed: seed of the sample of a file that is not used whole.

    Returns:
        The rows.
    """

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return _labelled_rows(labels, rows_B, mixture, clusters, seed)

    counts_C = np.zeros(mixture.pools * clusters, np.int64)
    for label_N, _ in chunks():
        counts_C += np.bincount(label_N, minlength=len(counts_C))
    starts_C = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_C)])
    next_C = starts_C[:-1].copy()
    partial = Path(f"{path}.{uuid.uuid4().hex}.tmp")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        file_N2 = np.lib.format.open_memmap(partial, "w+", np.uint32, (int(starts_C[-1]), 2))
        for label_N, rows_N2 in chunks():
            order = np.argsort(label_N, kind="stable")
            label_N, size_C = label_N[order], np.bincount(label_N, minlength=len(next_C))
            rank_N = np.arange(len(order)) - (np.cumsum(size_C) - size_C)[label_N]
            file_N2[next_C[label_N] + rank_N] = rows_N2[order]
            next_C += size_C
        file_N2.flush()
        del file_N2
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return open_similar_rows(path, starts_C, clusters)


def open_similar_rows(path: str, starts_C: np.ndarray, clusters: int) -> SimilarRows:
    """Return the rows of a file that `sort_by_cluster` has written; reads it once, for the digest.

    Args:
        path: the file.
        starts_C: first row of each cluster, and the number of rows.
        clusters: clusters of each sequence.

    Returns:
        The rows.
    """
    file_N2 = np.load(path, mmap_mode="r")
    parts = [fingerprint(file_N2[at : at + SORTED_ROWS]) for at in range(0, len(file_N2), SORTED_ROWS)]
    return SimilarRows(path, starts_C, clusters, fingerprint([starts_C, *parts]))


def _labelled_rows(
    labels: Callable[[int, int], np.ndarray], rows_B: np.ndarray, mixture: Mixture, clusters: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for about a million rows at a time, cluster (N,) among those of all sequences and (block, number)."""
    pool_B, ends_B = mixture.pool_F[mixture.file_B], np.cumsum(rows_B)
    samples = _samples(rows_B, mixture, seed)
    first = 0
    while first < len(rows_B):
        start = int(ends_B[first] - rows_B[first])
        last = max(first + 1, int(np.searchsorted(ends_B, start + SORTED_ROWS, side="right")))
        stop = int(ends_B[last - 1])
        block_N = np.repeat(np.arange(first, last), rows_B[first:last])
        number_N = np.arange(start, stop) - (ends_B - rows_B)[block_N]
        used_N = pool_B[block_N] >= 0
        for block in range(first, last) if samples else ():
            if block in samples:
                inside = slice(int(ends_B[block] - rows_B[block]) - start, int(ends_B[block]) - start)
                used_N[inside] &= np.isin(number_N[inside], samples[block])
        label_N = labels(start, stop).astype(np.int64) + pool_B[block_N] * clusters
        yield label_N[used_N], np.stack([block_N, number_N], axis=1)[used_N]
        first = last


def _samples(rows_B: np.ndarray, mixture: Mixture, seed: int) -> dict[int, np.ndarray]:
    """Return the numbers of the used rows of each block of which some are not used."""
    if (mixture.used_F == np.bincount(mixture.file_B, rows_B, len(mixture.used_F))).all():
        return {}
    samples = {}
    for pool in range(mixture.pools):
        sequence = RowSequence(rows_B, mixture, pool, seed, 0)
        for index in np.flatnonzero(sequence.used_B < sequence.rows_B):
            samples[int(sequence.blocks_B[index])] = sequence.used_rows(int(index))
    return samples
