"""Training order of an epoch's rows: a function of (seed, epoch, data, global batch) only.

An epoch's rows are one shuffled sequence, or one for each data set (`mixture.py`). A sequence is cut into M
lanes whose lengths differ by at most one; M is the largest divisor of the global batch not above 1,024. Each step takes
global_batch / M rows from every lane, so global batch k is the same rows for any number of workers: worker r of W reads
lanes j with j * W // M == r. With several sequences a seeded schedule selects the one of each step.
With clusters of similar rows (`similar_rows.py`) a sequence is cut into steps inside of clusters, which the lanes share
in the same way.
Inside a lane, windows of a fixed number of steps are permuted: to start at step k, nothing before its window is read.

Memory: a process that reads a window for all lanes holds its rows: at most 32,768, of about 64 MiB of text, or one
global batch if that is more; one of W workers holds a W-th of it. The first windows are short, so that the first step
starts early.
Lanes follow the «elastic determinism» of MosaicML Streaming: https://docs.mosaicml.com/projects/streaming

Letters in array names: D pools (sequences), S steps of an epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raybge.data.mixture import Mixture, RowSequence, Span, generator
from raybge.data.similar_rows import SimilarRows
from raybge.util.digest import fingerprint
from raybge.util.errors import UserError

MAX_LANES = 1024
WINDOW_ROWS, WINDOW_BYTES = 32_768, 64 << 20
SMALLEST_BLOCK, LARGEST_BLOCK, BLOCKS = 16 << 10, 1 << 20, 8192


def block_bytes(total_bytes: int) -> int:
    """Return the size of a block for shuffling, so that there are about 8,192 blocks of 16 KiB to 1 MiB."""
    return min(max(total_bytes // BLOCKS, SMALLEST_BLOCK), LARGEST_BLOCK)


def window_rows(total_bytes: int, total_rows: int) -> int:
    """Return the rows of a window: 64 MiB of rows of the mean size, at most 32,768."""
    return max(1, min(WINDOW_ROWS, WINDOW_BYTES * total_rows // max(total_bytes, 1)))


def lane_count(global_batch: int) -> int:
    """Return M, the largest divisor of the global batch that is at most 1,024."""
    return next(m for m in range(min(global_batch, MAX_LANES), 0, -1) if global_batch % m == 0)


@dataclass(frozen=True)
class LaneWindow:
    """Rows of one lane in one window.

    Args:
        lane: number of the lane.
        spans: the rows in lane order.
        seed: seed of the window's permutation; None: the spans are in the order of training.
    """

    lane: int
    spans: tuple[Span, ...]
    seed: tuple[int, ...] | None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(len(s.rows) for s in self.spans)

    def permutation(self) -> np.ndarray:
        """Return the order in which the window's rows are trained."""
        if self.seed is None:
            return np.arange(self.rows)
        return generator("window", *self.seed).permutation(self.rows)


@dataclass(frozen=True)
class Window:
    """Rows that one worker reads for steps [first_step, last_step).

    Args:
        first_step: first step of the window.
        rows_a_step: rows per step of each lane.
        width: number of the worker's lanes.
        steps: for each step the position of its pool in the window, and the number of earlier steps of that pool.
        lanes: for each pool of the window, one after the other, a LaneWindow of each lane.
    """

    first_step: int
    rows_a_step: int
    width: int
    steps: tuple[tuple[int, int], ...]
    lanes: tuple[LaneWindow, ...]

    @property
    def last_step(self) -> int:
        """End of the window, exclusive."""
        return self.first_step + len(self.steps)

    def step_rows(self, step: int) -> list[tuple[int, int]]:
        """Return (index into `lanes`, index into the lane's permuted rows) of a step's rows, in batch order."""
        place, before = self.steps[step - self.first_step]
        first = before * self.rows_a_step
        return [
            (i, row)
            for i in range(place * self.width, (place + 1) * self.width)
            for row in range(first, min(first + self.rows_a_step, self.lanes[i].rows))
        ]


class Order:
    """Training order of all epochs of a run.

    Args:
        rows: valid rows of each block, in file order.
        global_batch: rows of one step over all workers.
        seed: seed of every order.
        drop_last: drop the last step of a sequence if it is not full.
        mixture: rows per epoch of each file; default: each row once, in one sequence.
        window_rows: rows of a window, rounded down to whole steps, at least one step.
        similar: rows by cluster, for steps of similar rows; then each row occurs once. None: steps of random rows.
    """

    def __init__(
        self,
        rows: Sequence[int] | np.ndarray,
        global_batch: int,
        seed: int,
        drop_last: bool = False,
        mixture: Mixture | None = None,
        window_rows: int = WINDOW_ROWS,
        similar: SimilarRows | None = None,
    ):
        self.rows = np.asarray(rows, dtype=np.int64)
        self.mixture = mixture or Mixture.of_everything(self.rows)
        self.global_batch = global_batch
        self.seed = seed
        self.lanes = lane_count(global_batch)
        self.rows_a_step = global_batch // self.lanes
        self.window_steps = max(1, window_rows // global_batch)
        self.similar = similar
        used = self.mixture.pool_F >= 0
        total_D = np.bincount(self.mixture.pool_F[used], self.mixture.total_F[used], self.mixture.pools)
        self.total_D = total_D.astype(np.int64)
        self.total = int(self.total_D.sum())
        longest_D = -(-self.total_D // self.lanes)
        self.steps_D = self.total_D // global_batch if drop_last else -(-longest_D // self.rows_a_step)
        self.steps = int(self.steps_D.sum())
        self.known: tuple[int, np.ndarray, np.ndarray] | None = None  # the latest schedule

    def with_similar(self, similar: SimilarRows) -> Order:
        """Return the order of the same rows in steps of similar ones."""
        order = copy.copy(self)
        order.similar = similar
        return order

    def identity(self) -> str:
        """Return a fingerprint of the order, which does not depend on the place of its files."""
        fields = {name: value for name, value in vars(self).items() if name != "similar"}
        return fingerprint({**fields, "similar": self.similar.digest} if self.similar else fields)

    def owned(self, rank: int, world: int) -> range:
        """Return the lanes that worker `rank` of `world` reads; UserError if there are more workers than lanes."""
        if world > self.lanes:
            raise UserError(
                f"{world} workers cannot share a global batch of {self.global_batch}: at most {self.lanes} "
                f"(its largest divisor up to {MAX_LANES:,}) can; change --global_batch_size or --num_workers"
            )
        mine = [j for j in range(self.lanes) if j * world // self.lanes == rank]
        return range(mine[0], mine[-1] + 1)

    def size(self, epoch: int, step: int) -> int:
        """Return the rows of a step over all workers: the global batch, or the rest of the step's sequence."""
        pool_S, nth_S = self.schedule(epoch)
        lengths = np.diff(np.arange(self.lanes + 1) * self.total_D[pool_S[step]] // self.lanes)
        return int(np.clip(lengths - nth_S[step] * self.rows_a_step, 0, self.rows_a_step).sum())

    def schedule(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return pool_S and nth_S: the pool of each step, and the number of earlier steps of that pool."""
        if self.known is None or self.known[0] != epoch:
            pool_S = np.repeat(np.arange(len(self.steps_D)), self.steps_D)
            if len(self.steps_D) > 1:
                pool_S = generator("schedule", self.seed, epoch).permutation(pool_S)
            nth_S = np.empty(self.steps, np.int64)
            by_pool = np.argsort(pool_S, kind="stable")
            nth_S[by_pool] = np.arange(self.steps) - np.repeat(np.cumsum(self.steps_D) - self.steps_D, self.steps_D)
            self.known = (epoch, pool_S, nth_S)
        return self.known[1:]

    def window_bounds(self, start_step: int = 0) -> list[tuple[int, int]]:
        """Return steps [first, last) of each window, from the window of `start_step` on.

        Windows have 1, 1, 2, 4, ... steps, then `window_steps`.
        """
        bounds, first = [], 0
        while first < self.steps:
            last = min(first + min(max(first, 1), self.window_steps), self.steps)
            if last > start_step:
                bounds.append((first, last))
            first = last
        return bounds

    def windows(self, epoch: int, rank: int, world: int, start_step: int = 0) -> Iterator[Window]:
        """Yield the windows that one worker reads in an epoch.

        Args:
            epoch: number of the epoch.
            rank: number of the worker.
            world: number of workers.
            start_step: windows before the one of this step are skipped.

        Yields:
            The windows in order.

        Raises:
            UserError: there are more workers than lanes.
        """
        pool_S, nth_S = self.schedule(epoch)
        lanes = self.owned(rank, world)
        sequences: dict[int, RowSequence] = {}
        for first, last in self.window_bounds(start_step):
            steps = list(zip(pool_S[first:last].tolist(), nth_S[first:last].tolist(), strict=True))
            begin: dict[int, int] = {}  # first step of each pool, in the order in which the window needs the pools
            for pool, nth in steps:
                begin.setdefault(pool, nth)
            ends = {pool: nth + 1 for pool, nth in steps}
            parts: list[LaneWindow] = []
            for pool in begin:
                if self.similar:
                    parts += self._similar_lanes(self.similar, epoch, pool, lanes, begin[pool], ends[pool])
                    continue
                if pool not in sequences:
                    sequences[pool] = RowSequence(self.rows, self.mixture, pool, self.seed, epoch)
                for lane in lanes:
                    low, high = self._lane_rows(pool, lane, begin[pool], ends[pool])
                    seed = (self.seed, epoch, pool, lane, first)
                    parts.append(LaneWindow(lane, sequences[pool].spans(low, high), seed))
            place = {pool: at for at, pool in enumerate(begin)}
            positions = tuple((place[pool], nth - begin[pool]) for pool, nth in steps)
            yield Window(first, self.rows_a_step, len(lanes), positions, tuple(parts))

    def _lane_rows(self, pool: int, lane: int, first: int, last: int) -> tuple[int, int]:
        """Return the rows [low, high) of the sequence that a lane contributes to the pool's steps [first, last)."""
        start, stop = (int(j * self.total_D[pool] // self.lanes) for j in (lane, lane + 1))
        low = min(start + first * self.rows_a_step, stop)
        return low, min(start + last * self.rows_a_step, stop)

    def _similar_lanes(
        self, similar: SimilarRows, epoch: int, pool: int, lanes: range, first: int, last: int
    ) -> list[LaneWindow]:
        """Return the rows of the lanes in the pool's steps [first, last).

        The steps are a permutation of the parts of the chain; the part that is not a full step is the last one.
        """
        full = int(self.total_D[pool]) // self.global_batch
        part_S = np.append(generator("parts", self.seed, epoch, pool).permutation(full), full)[first:last]
        positions = []
        for lane in lanes:
            start, stop = (j * int(self.total_D[pool]) // self.lanes for j in (lane, lane + 1))
            # rows of earlier lanes in the step: the last step has what full ones leave of each lane
            before_S = np.where(part_S < full, lane * self.rows_a_step, start - lane * full * self.rows_a_step)
            size_S = np.where(part_S < full, self.rows_a_step, stop - start - full * self.rows_a_step)
            begin_S = part_S * self.global_batch + before_S
            positions.append(np.concatenate([np.arange(b, b + n) for b, n in zip(begin_S, size_S, strict=True)]))
        rows_N2 = similar.rows(np.concatenate(positions), pool, self.seed, epoch)
        spans = [Span(block, 0, (number,)) for block, number in rows_N2.tolist()]
        ends = np.cumsum([len(each) for each in positions]).tolist()
        return [
            LaneWindow(lane, tuple(spans[end - len(each) : end]), None)
            for lane, each, end in zip(lanes, positions, ends, strict=True)
        ]
