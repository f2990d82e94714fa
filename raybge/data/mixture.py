"""Which rows an epoch has, how often, and the shuffled sequences they stand in.

Of a file all rows are used or a sample of them, each once an epoch or by a weight, in one pool with other files or in a
pool of its own. Every choice is a function of (seed, epoch, data): two processes that ask get the same answer.

A sequence goes through its blocks in rounds. Each round takes a random sixteenth of every block's rows, the blocks in
random order: rows that are neighbours in a file come in different rounds with probability 15/16, and are then as far
apart as in a uniform shuffle of everything. The price is that a block is read up to 16 times an epoch, though only once
for a window. Lines that are not wanted are not parsed, and to find a byte costs a thousandth of tokenising it.

Letters in array names: B blocks, F files, R rounds.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

ROUNDS = 16


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """Random numbers that depend on the arguments alone; another purpose gives unrelated ones."""
    return np.random.default_rng((zlib.crc32(purpose.encode()), *numbers))


@dataclass(frozen=True)
class Span:
    """Rows of a block, by their numbers among its good rows, in the order they are trained before windows permute them.

    `copy`: 0 for a row's first appearance in the epoch, 1 for its second, ...
    """

    block: int
    copy: int
    rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Mixture:
    """How much of each file an epoch has.

    Args:
        file_B: file of each block; blocks of a file stand together, files in ascending order.
        used_F: rows of the file that are used at all: a sample, the same in every epoch.
        weight_F: how often an epoch has each of them; the fraction is that share of them, chosen anew each epoch.
        pool_F: the sequence the file's rows belong to, 0 to pools - 1; -1: none, the file is left out.
    """

    file_B: np.ndarray
    used_F: np.ndarray
    weight_F: np.ndarray
    pool_F: np.ndarray

    @classmethod
    def of_everything(cls, rows_B: np.ndarray) -> Mixture:
        """All rows once, in one sequence."""
        one = np.zeros(1, np.int64)
        return cls(np.zeros(len(rows_B), np.int64), one + rows_B.sum(), np.ones(1), one)

    @property
    def pools(self) -> int:
        return int(self.pool_F.max()) + 1

    @property
    def whole_F(self) -> np.ndarray:
        """How often every used row comes."""
        return np.floor(self.weight_F).astype(np.int64)

    @property
    def extra_F(self) -> np.ndarray:
        """How many of them come once more. A weight never leaves a file without any row."""
        extra_F = np.floor((self.weight_F - self.whole_F) * self.used_F + 0.5).astype(np.int64)
        return np.where(self.whole_F == 0, np.maximum(extra_F, np.minimum(self.used_F, 1)), extra_F)

    @property
    def total_F(self) -> np.ndarray:
        """Rows that an epoch has of each file: the same number in every epoch."""
        return np.where(self.pool_F < 0, 0, self.used_F * self.whole_F + self.extra_F)


class Sequence:
    """The rows of one pool in the order of one epoch. Memory: a few numbers a block.

    Args:
        rows_B: good rows of all blocks of the data.
        mixture: what is taken of them.
        pool: which of its pools.
        seed, epoch: of every random choice.
    """

    def __init__(self, rows_B: np.ndarray, mixture: Mixture, pool: int, seed: int, epoch: int):
        files = np.flatnonzero(mixture.pool_F == pool)
        ends = np.searchsorted(mixture.file_B, [files, files + 1])
        # from here on B and F are the pool's own blocks and files
        self.blocks_B = np.concatenate([np.arange(start, stop) for start, stop in ends.T] or [np.zeros(0, np.int64)])
        self.rows_B = rows_B[self.blocks_B]
        self.random = (seed, epoch, pool)
        file_B = np.repeat(np.arange(len(files)), ends[1] - ends[0])
        self.used_B = _spread(self.rows_B, file_B, mixture.used_F[files], generator("used", seed, pool))
        extra_B = _spread(self.used_B, file_B, mixture.extra_F[files], generator("extra", *self.random))
        whole_B = mixture.whole_F[files][file_B]
        count_B = np.where(self.used_B > 0, whole_B + (extra_B > 0), 0)
        # a block stands in each round once for each appearance of its rows: `own` is the block, `rows` what it gives
        self.own = np.repeat(np.arange(len(self.blocks_B)), count_B)
        self.copy = np.arange(len(self.own)) - np.repeat(np.cumsum(count_B) - count_B, count_B)
        self.rows = np.where(self.copy < whole_B[self.own], self.used_B[self.own], extra_B[self.own])
        self.cut = generator("cut", *self.random).integers(ROUNDS, size=len(self.own))
        self.ends_R = np.cumsum([int(np.diff(self._edges(nth)).sum()) for nth in range(ROUNDS)])
        self.layout: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None  # of the round that was asked last

    def spans(self, low: int, high: int) -> tuple[Span, ...]:
        """Rows [low, high) of the sequence."""
        spans = []
        while low < high:
            nth = int(np.searchsorted(self.ends_R, low, side="right"))
            begin = int(self.ends_R[nth - 1]) if nth else 0
            stop = min(high, int(self.ends_R[nth]))
            spans += self._round_spans(nth, low - begin, stop - begin)
            low = stop
        return tuple(spans)

    def _edges(self, nth: int) -> np.ndarray:
        """(len(own), 2): from where to where round `nth` takes the shuffled rows of each block."""
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
        """The rows of a block, by number, in the order in which the rounds take them."""
        own, copy = int(self.own[place]), int(self.copy[place])
        block, rows, used = int(self.blocks_B[own]), int(self.rows_B[own]), int(self.used_B[own])
        if rows == 1:
            return np.zeros(1, np.int64)
        seed, epoch, _ = self.random
        numbers = np.arange(rows)
        if used < rows:
            numbers = generator("sample", seed, block).choice(rows, used, replace=False)
        return generator("rows", seed, epoch, block, copy).permutation(numbers)


def _spread(rows_B: np.ndarray, file_B: np.ndarray, take_F: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """How many rows each block gives so that a file gives take_F: its share of them, rounded up or down by chance."""
    order = np.lexsort((random.random(len(rows_B)), file_B))  # the blocks of each file in random order
    rows, file = rows_B[order], file_B[order]
    total_F = np.bincount(file, rows, len(take_F)).astype(np.int64)
    stop = np.cumsum(rows) - (np.cumsum(total_F) - total_F)[file]
    take, total = take_F[file], np.maximum(total_F[file], 1)
    give_B = np.empty_like(rows_B)
    give_B[order] = stop * take // total - (stop - rows) * take // total
    return give_B
