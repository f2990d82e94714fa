"""Lanes: equal global batches for any number of workers, correct row counts, and starts in the middle of an epoch.

All with one sequence and with one per data set.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybge.data.mixture import Mixture
from raybge.data.order import Order, Window, block_bytes, lane_count, window_rows
from raybge.util.errors import UserError

BLOCK_ROWS = [5, 0, 17, 3, 9, 26, 1, 12, 8, 30]
Picked = tuple[int, int, int]  # block, row in it, which of its appearances


def batches(order: Order, world: int, epoch: int = 0, start_step: int = 0) -> list[list[Picked]]:
    """Return the global batches from `start_step` on, the workers' shares concatenated."""
    steps: list[list[Picked]] = [[] for _ in range(order.steps - start_step)]
    for rank in range(world):
        for window in order.windows(epoch, rank, world, start_step):
            share = rows_of(window)
            for step in range(max(window.first_step, start_step), window.last_step):
                steps[step - start_step] += share[step]
    return steps


def rows_of(window: Window) -> dict[int, list[Picked]]:
    """Return the rows of a window by step."""
    lanes = []
    for lane in window.lanes:
        rows = [(span.block, row, span.copy) for span in lane.spans for row in span.rows]
        lanes.append([rows[i] for i in lane.permutation()])
    return {
        step: [lanes[i][at] for i, at in window.step_rows(step)] for step in range(window.first_step, window.last_step)
    }


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[np.ndarray, Mixture]:
    """Draw rows per block, samples, weights and pools of some files."""
    blocks_F = draw(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), min_size=1, max_size=4))
    rows_F = [sum(rows) for rows in blocks_F]
    used_F = [draw(st.integers(0, n)) for n in rows_F]
    used_F[0] = max(used_F[0], min(rows_F[0], 1))
    weight_F = draw(st.lists(st.sampled_from([1.0, 0.5, 2.0, 2.5, 0.01]), min_size=len(rows_F), max_size=len(rows_F)))
    together = draw(st.booleans())
    pool_F = [i if together else 0 for i in range(len(rows_F))]
    file_B = np.repeat(np.arange(len(blocks_F)), [len(rows) for rows in blocks_F])
    mixture = Mixture(file_B, np.array(used_F), np.array(weight_F), np.array(pool_F))
    return np.array([n for rows in blocks_F for n in rows]), mixture


@settings(max_examples=50)
@given(
    data=mixtures(),
    global_batch=st.integers(1, 24),
    seed=st.integers(0, 5),
    window=st.sampled_from([1, 7, 64, 32_768]),
    drop_last=st.booleans(),
    start=st.floats(0, 1),
)
def test_the_same_batches_for_any_number_of_workers_and_any_start(data, global_batch, seed, window, drop_last, start):
    rows, mixture = data
    order = Order(rows, global_batch, seed, drop_last, mixture, window)
    alone = batches(order, 1)
    assert [len(step) for step in alone] == [order.size(0, k) for k in range(order.steps)]
    assert max((len(step) for step in alone), default=0) <= global_batch
    short = Counter(mixture.pool_F[mixture.file_B[step[0][0]]] for step in alone if len(step) < global_batch)
    if drop_last:
        assert not short
    else:
        assert order.total == sum(map(len, alone))
        # all steps of a sequence are full but its last, where lanes run out
        assert all(count == 1 for count in short.values())
    for step in alone:  # a step's rows are of one pool
        assert len({int(mixture.pool_F[mixture.file_B[block]]) for block, _, _ in step}) == 1
    for world in range(2, min(5, order.lanes) + 1):
        assert batches(order, world) == alone
    first = int(start * order.steps)
    assert batches(order, min(2, order.lanes), start_step=first) == alone[first:]


@settings(max_examples=50)
@given(data=mixtures(), global_batch=st.integers(1, 24), epoch=st.integers(0, 3))
def test_each_row_occurs_by_its_weight(data, global_batch, epoch):
    rows, mixture = data
    seen = Counter(row for step in batches(Order(rows, global_batch, 1, False, mixture), 1, epoch) for row in step)
    assert max(seen.values(), default=1) == 1  # never the same appearance twice
    for file, (used, weight) in enumerate(zip(mixture.used_F, mixture.weight_F, strict=True)):
        times = Counter((block, row) for block, row, _ in seen if mixture.file_B[block] == file)
        whole, extra = divmod(weight, 1)
        fraction = int(extra * used + 0.5) if whole else max(int(extra * used + 0.5), min(used, 1))
        wanted = {whole + 1: fraction, whole: used - fraction}
        assert Counter(times.values()) == {k: n for k, n in wanted.items() if k and n}
        assert all(0 <= row < rows[block] for block, row in times)


def test_every_row_occurs_once_by_default():
    for seed in range(3):
        seen = [row for step in batches(Order(BLOCK_ROWS, 6, seed), 1) for row in step]
        assert sorted(seen) == [(b, r, 0) for b, n in enumerate(BLOCK_ROWS) for r in range(n)]


def test_order_depends_on_seed_and_epoch():
    order = Order(BLOCK_ROWS, 6, seed=1)
    assert batches(order, 1, epoch=0) == batches(order, 2, epoch=0)
    assert batches(order, 1, epoch=0) != batches(order, 1, epoch=1)
    assert batches(order, 1) != batches(Order(BLOCK_ROWS, 6, seed=2), 1)


def two_sets(
    weight: tuple[float, float] = (1, 1), used: tuple[int, int] = (400, 200), together: bool = True, seed: int = 0
) -> Order:
    """Return the order of files of 400 and 200 rows, in blocks of 20 and batches of 16."""
    file_B = np.repeat([0, 1], [20, 10])
    mixture = Mixture(file_B, np.array(used), np.array(weight, float), np.array([0, int(together)]))
    return Order(np.full(30, 20), 16, seed, False, mixture)


def files_of(order: Order, epoch: int = 0) -> list[int]:
    return [int(order.mixture.file_B[step[0][0]]) for step in batches(order, 1, epoch)]


def test_the_schedule_of_data_sets_differs_between_epochs_and_seeds():
    order = two_sets()
    assert files_of(order) == files_of(two_sets()) != files_of(two_sets(seed=1))
    assert Counter(files_of(order)) == {0: 25, 1: 13}  # the last 8 of 200 rows are a step too
    assert files_of(order) != files_of(order, epoch=1)
    switches = sum(a != b for a, b in zip(files_of(order), files_of(order)[1:], strict=False))
    assert switches == pytest.approx(2 * 25 * 13 / 38, abs=6)  # as in a random order of 38 steps; 3 standard deviations


def test_the_additional_rows_of_a_weight_differ_between_epochs():
    order = two_sets(weight=(1, 1.5))

    def extra(epoch):
        return {(b, r) for step in batches(order, 1, epoch) for b, r, copy in step if copy == 1}

    assert len(extra(0)) == len(extra(1)) == 100
    assert 30 < len(extra(0) & extra(1)) < 70  # 50 by chance
    chosen = Counter(row for epoch in range(20) for row in extra(epoch))
    assert len(chosen) == 200 and max(chosen.values()) < 20  # each about 10 times


def test_samples_of_single_row_blocks_differ_between_epochs():
    """Half of 40 rows, one per block: the chosen blocks change, and every row is chosen in some epoch."""
    mixture = Mixture(np.zeros(40, int), np.array([40]), np.array([0.5]), np.zeros(1, int))
    order = Order(np.ones(40, int), 4, 0, False, mixture)
    chosen = [sorted(b for step in batches(order, 1, epoch) for b, _, _ in step) for epoch in range(12)]
    assert all(len(blocks) == 20 for blocks in chosen)
    assert len({b for blocks in chosen for b in blocks}) == 40
    assert len(set(map(tuple, chosen))) == 12


def test_a_sample_is_the_same_in_every_epoch_and_of_all_parts_of_the_file():
    order = two_sets(used=(100, 200))

    def sample(epoch):
        return {(b, r) for step in batches(order, 1, epoch) for b, r, _ in step if b < 20}

    assert sample(0) == sample(7)
    assert Counter(b for b, _ in sample(0)) == dict.fromkeys(range(20), 5)
    other = Order(order.rows, 16, 1, False, order.mixture)
    assert sample(0) != {(b, r) for step in batches(other, 1) for b, r, _ in step if b < 20}
    assert len({r for _, r in sample(0)}) > 15


@pytest.mark.parametrize("start", [0, 1, 5, 9, 18])
def test_start_in_the_middle_of_an_epoch(start):
    """The batches equal those of the whole epoch, and no earlier window is read."""
    order = Order(BLOCK_ROWS, 6, seed=3, window_rows=24)  # windows of 1, 1, 2, 4, 4, ... steps of 6
    assert batches(order, 3, start_step=start) == batches(order, 1)[start:]
    first = {0: 0, 1: 1, 5: 4, 9: 8, 18: 16}[start]
    windows = list(order.windows(0, 0, 1, start))
    assert windows[0].first_step == first == order.window_bounds(start)[0][0]
    read = sum(lane.rows for window in windows for lane in window.lanes)
    assert read == order.total - first * 6


def test_drop_last_drops_incomplete_batches():
    order = Order([10, 4], 4, seed=0, drop_last=True)
    assert order.steps == 3
    assert [len(step) for step in batches(order, 2)] == [4, 4, 4]


def test_lanes_are_the_largest_divisor_up_to_1024():
    counts = [lane_count(g) for g in (1, 7, 32, 1024, 1500, 2048, 65_536, 1031)]
    assert counts == [1, 7, 32, 1024, 750, 1024, 1024, 1]


def test_more_workers_than_lanes_are_refused():
    with pytest.raises(UserError, match="at most 2"):
        Order([100], 2, seed=0).owned(0, 3)


def test_a_window_bounds_the_rows_in_memory():
    order = Order(np.full(500, 1000), 4096, seed=0)
    held = [sum(lane.rows for lane in window.lanes) for window in order.windows(0, 0, 1, 100)]
    assert max(held) == 32_768
    halves = [sum(lane.rows for lane in window.lanes) for window in order.windows(0, 1, 2, 100)]
    assert max(halves) == 16_384
    assert window_rows(10_000, 100) == 32_768
    assert window_rows(1 << 40, 1 << 27) == (64 << 20) // 8192
    assert window_rows(1 << 40, 1) == 1


def test_blocks_are_a_function_of_the_size():
    assert block_bytes(10_000) == 16 << 10
    assert block_bytes(1 << 40) == 1 << 20
    assert 16 << 10 < block_bytes(1 << 30) < 1 << 20


@pytest.mark.parametrize("window", [64, 32_768])
@pytest.mark.parametrize("global_batch", [16, 1024])
def test_neighbors_in_the_file_are_far_apart_in_the_order(global_batch, window):
    """The mean distance of neighbors is at least 0.9 of that in a uniform shuffle, a third of the epoch.

    This also holds if a window has a hundredth of the rows.
    """
    order = Order(np.full(100, 64), global_batch, seed=0, window_rows=window)
    position = {row[:2]: at for at, row in enumerate(r for step in batches(order, 1) for r in step)}
    gaps = [abs(position[b, r] - position[b, r + 1]) for b in range(100) for r in range(63)]
    assert np.mean(gaps) > 0.9 * 6400 / 3


def test_neighbors_in_the_file_rarely_share_a_batch():
    """Batches of 64 of 6,400 rows: in a uniform shuffle 1% of neighbors share one."""
    order = Order(np.full(100, 64), 64, seed=0, window_rows=64)
    step = {row[:2]: at for at, rows in enumerate(batches(order, 1)) for row in rows}
    together = [step[b, r] == step[b, r + 1] for b in range(100) for r in range(63)]
    assert np.mean(together) < 0.02
