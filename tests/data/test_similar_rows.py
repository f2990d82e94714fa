"""Steps of similar rows: the same for any number of workers and any start, each row once, and rows of one cluster."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_order import batches

from raybge.data import similar_rows
from raybge.data.mixture import Mixture
from raybge.data.order import Order
from raybge.data.similar_rows import SimilarRows, open_similar_rows, sort_by_cluster

CLUSTERS = 7


def sort(folder, rows_B, mixture, label_N, clusters=CLUSTERS, seed=3) -> SimilarRows:
    return sort_by_cluster(
        str(folder / "rows.npy"), lambda start, stop: label_N[start:stop], rows_B, mixture, clusters, seed
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("similar")


@st.composite
def data(draw: st.DrawFn) -> tuple[np.ndarray, Mixture, np.ndarray]:
    """Draw rows per block, samples and sequences of some files, and a cluster for each row."""
    blocks_F = draw(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), min_size=1, max_size=4))
    rows_F = [sum(rows) for rows in blocks_F]
    used_F = [n if draw(st.booleans()) else draw(st.integers(0, n)) for n in rows_F]
    used_F[0] = max(used_F[0], min(rows_F[0], 1))
    pool_F = [i if draw(st.booleans()) else 0 for i in range(len(rows_F))]
    pool_F = [sorted(set(pool_F)).index(pool) for pool in pool_F]
    file_B = np.repeat(np.arange(len(blocks_F)), [len(rows) for rows in blocks_F])
    mixture = Mixture(file_B, np.array(used_F), np.ones(len(rows_F)), np.array(pool_F))
    rows_B = np.array([n for rows in blocks_F for n in rows])
    labels = np.random.default_rng(draw(st.integers(0, 9))).integers(CLUSTERS, size=rows_B.sum())
    return rows_B, mixture, labels


@settings(max_examples=60)
@given(
    data=data(),
    global_batch=st.integers(1, 24),
    window=st.sampled_from([1, 64, 32_768]),
    drop_last=st.booleans(),
    start=st.floats(0, 1),
    sorted_rows=st.sampled_from([1, 50, 1 << 20]),
)
def test_the_same_steps_for_any_number_of_workers_and_any_start(
    folder, data, global_batch, window, drop_last, start, sorted_rows
):
    rows_B, mixture, label_N = data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similar_rows, "SORTED_ROWS", sorted_rows)
        similar = sort(folder, rows_B, mixture, label_N)
    order = Order(rows_B, global_batch, 3, drop_last, mixture, window, similar)
    alone = batches(order, 1)
    assert [len(step) for step in alone] == [order.size(0, k) for k in range(order.steps)]
    for world in (2, 3):
        if world <= order.lanes:
            assert batches(order, world) == alone
            first = int(start * order.steps)
            assert batches(order, world, start_step=first) == alone[first:]
    # the rows of an epoch are those of an epoch in random order
    rows = [row for step in alone for row in step]
    assert len(set(rows)) == len(rows)
    random = [row for step in batches(Order(rows_B, global_batch, 3, drop_last, mixture, window), 1) for row in step]
    if not drop_last:
        assert sorted(rows) == sorted(random)
    assert len(rows) == len(random)
    for step in alone:
        assert len({mixture.pool_F[mixture.file_B[block]] for block, _, _ in step}) == 1
    # a step is a part of a chain of the clusters: at most two of its clusters are not whole
    start_B = np.cumsum(rows_B) - rows_B
    whole = Counter((mixture.pool_F[mixture.file_B[b]], label_N[start_B[b] + r]) for b, r, _ in random)
    for step in alone if not drop_last else []:
        here = Counter((mixture.pool_F[mixture.file_B[b]], label_N[start_B[b] + r]) for b, r, _ in step)
        assert sum(count < whole[cluster] for cluster, count in here.items()) <= 2


def simple_order(folder, seed=0, drop_last=False, clusters=5) -> tuple[Order, np.ndarray]:
    """Return the order of 1,000 rows in steps of 16, and their clusters."""
    rows_B = np.full(50, 20)
    label_N = np.random.default_rng(0).integers(clusters, size=1000)
    mixture = Mixture.of_everything(rows_B)
    similar = sort(folder, rows_B, mixture, label_N, clusters)
    return Order(rows_B, 16, seed, drop_last, mixture, similar=similar), label_N


def test_most_steps_are_of_one_cluster(tmp_path):
    order, label_N = simple_order(tmp_path)
    mixed = sum(len({label_N[20 * block + row] for block, row, _ in step}) > 1 for step in batches(order, 1))
    assert mixed <= 5 + 2  # one for each border, one at the end of the chain and one where it is rotated


def test_the_parts_of_the_chain_are_shuffled(tmp_path):
    """With the parts in the order of the chain, the cluster would change five times in 62 steps."""
    order, label_N = simple_order(tmp_path)
    labels = [
        Counter(label_N[20 * block + row] for block, row, _ in step).most_common(1)[0][0] for step in batches(order, 1)
    ]
    assert sum(a != b for a, b in itertools.pairwise(labels)) > 30


def test_rows_of_a_step_are_in_different_steps_of_the_next_epoch(tmp_path):
    order, _ = simple_order(tmp_path)
    one, two = (
        {row: number for number, step in enumerate(batches(order, 1, epoch)) for row in step} for epoch in (0, 1)
    )
    pairs = Counter((one[row], two[row]) for row in one)
    assert max(pairs.values()) < 10  # of 16 rows of a step; a step's cluster has about 13 steps


def test_the_step_that_is_not_full_moves_along_the_chain(tmp_path):
    """Its rows, which --dataloader_drop_last leaves out, are of another cluster in another epoch."""
    order, label_N = simple_order(tmp_path)
    last = [{int(label_N[20 * block + row]) for block, row, _ in batches(order, 1, epoch)[-1]} for epoch in range(12)]
    assert len(set.union(*last)) >= 4


def test_epochs_and_seeds_differ(tmp_path):
    order, _ = simple_order(tmp_path)
    one, two = ({frozenset(step) for step in batches(order, 1, epoch)} for epoch in (0, 1))
    assert not one & two
    assert batches(order, 1) == batches(simple_order(tmp_path)[0], 1) != batches(simple_order(tmp_path, seed=1)[0], 1)


def test_every_row_is_trained_in_some_epoch_with_drop_last(tmp_path):
    order, _ = simple_order(tmp_path, drop_last=True)
    epochs = [{row for step in batches(order, 1, epoch) for row in step} for epoch in range(6)]
    assert [len(rows) for rows in epochs] == [992] * 6
    assert len(set.union(*epochs)) == 1000


def test_a_resumed_epoch_reads_nothing_before_its_window(tmp_path):
    order, _ = simple_order(tmp_path)
    order.window_steps = 4
    windows = list(order.windows(0, 0, 1, 20))
    assert windows[0].first_step == order.window_bounds(20)[0][0] == 20
    assert sum(lane.rows for window in windows for lane in window.lanes) == 1000 - 20 * 16


def test_the_identity_depends_on_the_clusters_and_not_on_the_path(tmp_path):
    order, label_N = simple_order(tmp_path)
    similar = order.similar
    moved = tmp_path / "elsewhere" / "moved.npy"
    moved.parent.mkdir()
    (tmp_path / "rows.npy").rename(moved)
    again = open_similar_rows(str(moved), similar.starts_C, similar.clusters)
    order.similar = again
    assert again.digest == similar.digest
    plain = Order(order.rows, 16, 0, False, order.mixture)
    other = Order(
        order.rows, 16, 0, False, order.mixture, similar=sort(tmp_path, order.rows, order.mixture, label_N // 2)
    )
    assert len({order.identity(), plain.identity(), other.identity()}) == 3
