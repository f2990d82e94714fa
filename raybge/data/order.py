"""The order in which an epoch's rows are trained: a function of (seed, epoch, data, global batch) and of nothing else.

Blocks of the files are permuted by (seed, epoch). The permuted rows are cut into M lanes whose lengths differ by at
most one; M is the largest divisor of the global batch not above 1,024. Each step takes global_batch / M rows from every
lane, so global batch k is the same rows for any number of workers: worker r of W reads lanes j with j * W // M == r.
Inside a lane, windows of a fixed number of steps are permuted: to start at step k, nothing before its window is read.

Memory: a process that reads a window for all lanes holds max(32,768, global batch) rows; one of W workers a W-th of it.
The idea of lanes is MosaicML Streaming's «elastic determinism»: https://docs.mosaicml.com/projects/streaming
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raybge.errors import UserError

MAX_LANES = 1024
WINDOW_ROWS = 32_768
SMALLEST_BLOCK, LARGEST_BLOCK, BLOCKS = 16 << 10, 1 << 20, 8192


def block_bytes(total_bytes: int) -> int:
    """Bytes of a block to be shuffled: about 8,192 blocks, each between 16 KiB and 1 MiB."""
    return min(max(total_bytes // BLOCKS, SMALLEST_BLOCK), LARGEST_BLOCK)


def lane_count(global_batch: int) -> int:
    """M: the largest divisor of the global batch not above 1,024."""
    return next(m for m in range(min(global_batch, MAX_LANES), 0, -1) if global_batch % m == 0)


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of a block, counted among the block's good rows."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True)
class LaneWindow:
    """One lane's rows for one window, as spans in lane order, and the seed of the permutation that follows."""

    lane: int
    spans: tuple[Span, ...]
    seed: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(s.stop - s.start for s in self.spans)

    def permutation(self) -> np.ndarray:
        """The order in which the window's rows are trained."""
        return np.random.default_rng(self.seed).permutation(self.rows)


@dataclass(frozen=True)
class Window:
    """What one worker reads for steps [first_step, last_step): one LaneWindow for each of its lanes."""

    first_step: int
    last_step: int
    rows_a_step: int  # from each lane
    lanes: tuple[LaneWindow, ...]

    def step_rows(self, step: int) -> list[tuple[int, int]]:
        """(index into `lanes`, index into that lane's permuted rows) of a step's rows, in the batch's order."""
        first = (step - self.first_step) * self.rows_a_step
        return [
            (i, row)
            for i, lane in enumerate(self.lanes)
            for row in range(first, min(first + self.rows_a_step, lane.rows))
        ]


class Order:
    """The order of all epochs of one data set.

    Args:
        rows: good rows of each block, in file order.
        global_batch: rows of one step over all workers.
        seed: changes every order.
        drop_last: leave out the epoch's last step when it is not full.
    """

    def __init__(self, rows: Sequence[int] | np.ndarray, global_batch: int, seed: int, drop_last: bool = False):
        self.rows = np.asarray(rows, dtype=np.int64)
        self.total = int(self.rows.sum())
        self.global_batch = global_batch
        self.seed = seed
        self.lanes = lane_count(global_batch)
        self.rows_a_step = global_batch // self.lanes
        self.window_steps = max(1, WINDOW_ROWS // global_batch)
        longest = -(-self.total // self.lanes)
        self.steps = self.total // global_batch if drop_last else -(-longest // self.rows_a_step)

    def owned(self, rank: int, world: int) -> range:
        """The lanes that worker `rank` of `world` reads. UserError when there are more workers than lanes."""
        if world > self.lanes:
            raise UserError(
                f"{world} workers cannot share a global batch of {self.global_batch}: at most {self.lanes} "
                f"(its largest divisor up to {MAX_LANES:,}); change --global_batch_size or --num_workers"
            )
        mine = [j for j in range(self.lanes) if j * world // self.lanes == rank]
        return range(mine[0], mine[-1] + 1)

    def size(self, epoch: int, step: int) -> int:
        """Rows of an epoch's step over all workers: the global batch, or what is left of the epoch."""
        lengths = np.diff(np.arange(self.lanes + 1) * self.total // self.lanes)
        return int(np.clip(lengths - step * self.rows_a_step, 0, self.rows_a_step).sum())

    def lane_bounds(self, lane: int) -> tuple[int, int]:
        """The lane's rows [start, stop) in the sequence of permuted blocks."""
        return lane * self.total // self.lanes, (lane + 1) * self.total // self.lanes

    def windows(self, epoch: int, rank: int, world: int, start_step: int = 0) -> Iterator[Window]:
        """What worker `rank` of `world` reads in an epoch, from the window that holds `start_step` on."""
        blocks = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        ends = np.cumsum(self.rows[blocks])
        lanes = self.owned(rank, world)
        size = self.window_steps * self.rows_a_step
        for first_step in range(start_step - start_step % self.window_steps, self.steps, self.window_steps):
            parts = []
            for lane in lanes:
                start, stop = self.lane_bounds(lane)
                low = min(start + first_step * self.rows_a_step, stop)
                seed = (self.seed, epoch, lane, first_step)
                parts.append(LaneWindow(lane, _spans(blocks, ends, self.rows, low, min(low + size, stop)), seed))
            last_step = min(first_step + self.window_steps, self.steps)
            yield Window(first_step, last_step, self.rows_a_step, tuple(parts))


def _spans(blocks: np.ndarray, ends: np.ndarray, rows: np.ndarray, low: int, high: int) -> tuple[Span, ...]:
    """Rows [low, high) of the permuted sequence as spans of blocks; `ends` is where each permuted block ends in it."""
    spans = []
    at = int(np.searchsorted(ends, low, side="right"))
    while low < high:
        block = int(blocks[at])
        begin = int(ends[at]) - int(rows[block])
        stop = min(high, int(ends[at]))
        if stop > low:
            spans.append(Span(block, low - begin, stop - begin))
            low = stop
        at += 1
    return tuple(spans)
