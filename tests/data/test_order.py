"""Lanes: the same global batches for any number of workers, each row once, and a start in the middle of an epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybge.data import order as order_module
from raybge.data.order import Order, block_bytes, lane_count
from raybge.errors import UserError

BLOCK_ROWS = [5, 0, 17, 3, 9, 26, 1, 12, 8, 30]


def batches(order: Order, world: int, epoch: int = 0, start_step: int = 0) -> list[list[tuple[int, int]]]:
    """Global batches from `start_step` on: (block, row in block), the shares of all workers one after the other."""
    steps: list[list[tuple[int, int]]] = [[] for _ in range(order.steps - start_step)]
    for rank in range(world):
        for window in order.windows(epoch, rank, world, start_step):
            rows = [[(s.block, r) for s in lane.spans for r in range(s.start, s.stop)] for lane in window.lanes]
            permuted = [[r[i] for i in lane.permutation()] for r, lane in zip(rows, window.lanes, strict=True)]
            for step in range(max(window.first_step, start_step), window.last_step):
                steps[step - start_step] += [permuted[i][at] for i, at in window.step_rows(step)]
    return steps


@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda r: sum(r) > 0),
    global_batch=st.integers(1, 24),
    seed=st.integers(0, 5),
    window=st.sampled_from([1, 7, 64, 32_768]),
)
def test_every_row_once_and_the_same_batches_for_any_number_of_workers(rows, global_batch, seed, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "WINDOW_ROWS", window)
        order = Order(rows, global_batch, seed)
        alone = batches(order, 1)
        seen = [row for step in alone for row in step]
        assert sorted(seen) == [(b, r) for b, n in enumerate(rows) for r in range(n)]
        assert [len(step) for step in alone] == [order.size(0, k) for k in range(order.steps)]
        assert max(len(step) for step in alone) <= global_batch
        # All steps are full but those at the end, where lanes run out.
        assert sum(len(step) < global_batch for step in alone) <= 1
        for world in range(2, min(5, order.lanes) + 1):
            assert batches(order, world) == alone


def test_order_depends_on_seed_and_epoch():
    order = Order(BLOCK_ROWS, 6, seed=1)
    assert batches(order, 1, epoch=0) == batches(order, 2, epoch=0)
    assert batches(order, 1, epoch=0) != batches(order, 1, epoch=1)
    assert batches(order, 1) != batches(Order(BLOCK_ROWS, 6, seed=2), 1)


@pytest.mark.parametrize("start", [0, 1, 5, 9, 18])
def test_start_in_the_middle_of_an_epoch(start, monkeypatch):
    """The batches are those that would have come, and nothing before their window is read."""
    monkeypatch.setattr(order_module, "WINDOW_ROWS", 24)  # 4 steps of 6
    order = Order(BLOCK_ROWS, 6, seed=3)
    assert batches(order, 3, start_step=start) == batches(order, 1)[start:]
    windows = list(order.windows(0, 0, 1, start))
    assert windows[0].first_step == start - start % 4
    read = sum(lane.rows for window in windows for lane in window.lanes)
    assert read <= order.total - (start - start % 4) * 6


def test_drop_last_leaves_out_what_is_not_full():
    order = Order([10, 4], 4, seed=0, drop_last=True)
    assert order.steps == 3
    assert [len(step) for step in batches(order, 2)] == [4, 4, 4]


def test_lanes_are_the_largest_divisor_up_to_1024():
    assert [lane_count(g) for g in (1, 7, 32, 1024, 1500, 2048, 65_536, 1031)] == [
        1,
        7,
        32,
        1024,
        750,
        1024,
        1024,
        1,
    ]


def test_more_workers_than_lanes_are_refused():
    with pytest.raises(UserError, match="at most 2"):
        Order([100], 2, seed=0).owned(0, 3)


def test_a_window_bounds_what_a_process_holds():
    order = Order(np.full(4000, 1000), 4096, seed=0)
    held = [sum(lane.rows for lane in window.lanes) for window in order.windows(0, 0, 1)]
    assert max(held) <= 32_768
    halves = [sum(lane.rows for lane in window.lanes) for window in order.windows(0, 1, 2)]
    assert max(halves) <= 16_384


def test_blocks_are_a_function_of_the_size():
    assert block_bytes(10_000) == 16 << 10
    assert block_bytes(1 << 40) == 1 << 20
    assert 16 << 10 < block_bytes(1 << 30) < 1 << 20


def test_neighbours_in_the_file_are_far_apart_afterwards():
    """On average a row's neighbour comes about as far away as in a uniform shuffle: a third of the epoch."""
    rows = np.full(200, 20)
    order = Order(rows, 16, seed=0)
    position = {row: at for at, row in enumerate(r for step in batches(order, 1) for r in step)}
    gaps = [abs(position[b, r] - position[b, r + 1]) for b in range(200) for r in range(19)]
    assert np.mean(gaps) > 0.9 * 4000 / 3
