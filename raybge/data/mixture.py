"""Rows of an epoch: how often it has each row, and the shuffled sequences of rows.

All rows of a file are used or a sample of them, each once per epoch or by a weight, in one pool with other files or in
a pool of its own. Every choice is a function of (seed, epoch, data), so it is equal in every process.

A sequence goes through its blocks in rounds. Each round takes a random sixteenth of every block's rows, the blocks in
random order: rows that are neighbors in a file are in different rounds with probability 15/16, and are then as far
apart as in a uniform shuffle of all rows. The price is that a block is read up to 16 times per epoch, though only once
per window. Lines that are not needed are not parsed, and scanning a byte costs a thousandth of tokenizing it.

Letters in array names: B blocks, F files, R rounds.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

ROUNDS = 16


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """Return a generator that depends on the arguments only; different purposes are independent."""
    return np.random.default_rng((zlib.crc32(purpose.encode()), *numbers))


@dataclass(frozen=True)
class Span:
    """Rows of a block in training order, before the permutation of windows.

    Args:
        block: index of the block.
        copy: 0 for the first occurrence of the rows in the epoch, 1 for the second, ...
        rows: numbers of the rows among the block's valid rows.
    """

    block: int
    copy: int
    rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Mixture:
    """Rows per epoch of each file.

    Args:
        file_B: file of each block; blocks of a file are adjacent, files in ascending order.
        used_F: rows of the file that are used at all: a sample, the same in every epoch.
        weight_F: how often an epoch has each of them; the fraction is a share of them, sampled in each epoch.
        pool_F: the sequence of the file's rows, 0 to pools - 1; -1: the file is not used.
    """

    file_B: np.ndarray
    used_F: np.ndarray
    weight_F: np.ndarray
    pool_F: np.ndarray

    @classmethod
    def of_everything(cls, rows_B: np.ndarray) -> Mixture:
        """Return the mixture that has all rows once, in one sequence."""
        one = np.zeros(1, np.int64)
        return cls(np.zeros(len(rows_B), np.int64), one + rows_B.sum(), np.ones(1), one)

    @property
    def pools(self) -> int:
        """Number of sequences."""
        return int(self.pool_F.max()) + 1

    @property
    def whole_F(self) -> np.ndarray:
        """Occurrences of every used row."""
        whole_F: np.ndarray = np.floor(self.weight_F).astype(np.int64)
        return whole_F

    @property
    def extra_F(self) -> np.ndarray:
        """Number of used rows that occur once more. A positive weight never gives a file zero rows."""
        extra_F: np.ndarray = np.floor((self.weight_F - self.whole_F) * self.used_F + 0.5).astype(np.int64)
        extra_F = np.where(self.whole_F == 0, np.maximum(extra_F, np.minimum(self.used_F, 1)), extra_F)
        return extra_F

    @property
    def total_F(self) -> np.ndarray:
        """Rows per epoch of each file, the same number in every epoch."""
        total_F: np.ndarray = np.where(self.pool_F < 0, 0, self.used_F * self.whole_F + self.extra_F)
        return total_F


class RowSequence:
    """Rows of one pool in the order of one epoch. Memory: a few numbers per block.

    Args:
        rows_B: valid rows of all blocks of the data.
        mixture: rows per epoch of each file.
        pool: number of the pool.
        seed: seed of every random choice.
        epoch: number of the epoch.
    """

    def __init__(self, rows_B: np.ndarray, mixture: Mixture, pool: int, seed: int, epoch: int):
        files = np.flatnonzero(mixture.pool_F == pool)
        ends = np.searchsorted(mixture.file_B, [files, files + 1])
        # below, B and F are the blocks and files of this pool
        self.blocks_B = np.concatenate([np.arange(start, stop) for start, stop in ends.T] or [np.zeros(0, np.int64)])
        self.rows_B = rows_B[self.blocks_B]
        self.random = (seed, epoch, pool)
        file_B = np.repeat(np.arange(len(files)), ends[1] - ends[0])
        self.used_B = _spread(self.rows_B, file_B, mixture.used_F[files], generator("used", seed, pool))
        extra_B = _spread(self.used_B, file_B, mixture.extra_F[files], generator("extra", *self.random))
        whole_B = mixture.whole_F[files][file_B]
        count_B = np.where(self.used_B > 0, whole_B + (extra_B > 0), 0)
        # a block is in each round once per copy of its rows: `own` is the block, `rows` the number of its rows
        self.own = np.repeat(np.arange(len(self.blocks_B)), count_B)
        self.copy = np.arange(len(self.own)) - np.repeat(np.cumsum(count_B) - count_B, count_B)
        self.rows = np.where(self.copy < whole_B[self.own], self.used_B[self.own], extra_B[self.own])
        self.cut = generator("cut", *self.random).integers(ROUNDS, size=len(self.own))
        self.ends_R = np.cumsum([int(np.diff(self._edges(nth)).sum()) for nth in range(ROUNDS)])
        self.layout: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None  # of the latest round

    def spans(self, low: int, high: int) -> tuple[Span, ...]:
        """Return rows [low, high) of the sequence."""
        spans = []
        while low < high:
            nth = int(np.searchsorted(self.ends_R, low, side="right"))
            begin = int(self.ends_R[nth - 1]) if nth else 0
            stop = min(high, int(self.ends_R[nth]))
            spans += self._round_spans(nth, low - begin, stop - begin)
            low = stop
        return tuple(spans)

    def _edges(self, nth: int) -> np.ndarray:
        """Return first and last index, (len(own), 2), of the shuffled rows that round `nth` takes of each block."""
        edges = (self.rows * nth + self.cut) // ROUNDS, (self.rows * (nth + 1) + self.cut) // ROUNDS
        return np.stack(edges, axis=1)

    def _round_spans(self, nth: int, low: int, high: int) -> list[Span]:
        if self.layout is None or self.layout[0] != nth:
            edges = self._edges(nth)
            order = generator("blocks", *self.random, nth).permutation(np.flatnonzero(edges[:, 0] < edges[:, 1]))
            edges = edges[order]
            self.layout = (nth, order, edges, np.cumsum(edges[:, 1] - edges[:, 0]))
        _, order, edges, ends = self.layout
        spans = []
        at = int(np.searchsorted(ends, low, side="right"))
        while low < high:
            start, stop = map(int, edges[at])
            begin = int(ends[at]) - (stop - start)
            until = min(high, int(ends[at]))
            place = int(order[at])
            rows = self._shuffled(place)[start + low - begin : start + until - begin]
            spans.append(Span(int(self.blocks_B[self.own[place]]), int(self.copy[place]), tuple(rows.tolist())))
            low = until
            at += 1
        return spans

    def _shuffled(self, place: int) -> np.ndarray:
        """Return the numbers of a block's rows in the order in which the rounds take them."""
        own, copy = int(self.own[place]), int(self.copy[place])
        if int(self.rows_B[own]) == 1:
            return np.zeros(1, np.int64)
        seed, epoch, _ = self.random
        block = int(self.blocks_B[own])
        return generator("rows", seed, epoch, block, copy).permutation(self.used_rows(own))

    def used_rows(self, index: int) -> np.ndarray:
        """Return the numbers of the used rows of the sequence's block `index`, the same in every epoch."""
        rows, used = int(self.rows_B[index]), int(self.used_B[index])
        if used == rows:
            return np.arange(rows)
        return generator("sample", self.random[0], int(self.blocks_B[index])).choice(rows, used, replace=False)


def _spread(rows_B: np.ndarray, file_B: np.ndarray, take_F: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Distribute take_F rows of each file over its blocks: proportional shares, randomly rounded up or down."""
    order = np.lexsort((random.random(len(rows_B)), file_B))  # the blocks of each file in random order
    rows, file = rows_B[order], file_B[order]
    total_F = np.bincount(file, rows, len(take_F)).astype(np.int64)
    stop = np.cumsum(rows) - (np.cumsum(total_F) - total_F)[file]
    take, total = take_F[file], np.maximum(total_F[file], 1)
    give_B = np.empty_like(rows_B)
    give_B[order] = stop * take // total - (stop - rows) * take // total
    return give_B
