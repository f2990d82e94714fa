"""Drawing negatives: never a banned passage, never one twice, and never fewer than the pool can give."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raybge.search.sampling import draw


@given(
    st.integers(1, 20).flatmap(
        lambda passages: st.tuples(
            st.just(passages),
            st.lists(st.integers(-1, passages - 1), unique=True, max_size=20),
            st.lists(st.integers(-1, passages - 1), max_size=6),
        )
    ),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_draws_are_distinct_allowed_and_as_many_as_there_can_be(pool, number, seed):
    passages, candidates, banned = pool
    ids, fills = draw(np.array(candidates, int), np.array(banned, int), number, passages, np.random.default_rng(seed))
    allowed = set(range(passages)) - set(banned)
    good = set(candidates) & allowed
    assert len(set(ids.tolist())) == len(ids) == min(number, len(allowed))
    assert set(ids.tolist()) <= allowed
    # fills come only once the candidates are used up
    assert fills == max(0, len(ids) - len(good))
    assert set(ids[: len(ids) - fills].tolist()) == good if fills else set(ids.tolist()) <= good


def test_the_order_of_candidates_changes_nothing_and_the_seed_does():
    candidates = np.arange(100)
    first, _ = draw(candidates, np.array([3]), 10, 100, np.random.default_rng(0))
    turned, _ = draw(candidates[::-1].copy(), np.array([3]), 10, 100, np.random.default_rng(0))
    other, _ = draw(candidates, np.array([3]), 10, 100, np.random.default_rng(1))
    assert first.tolist() == turned.tolist() != other.tolist()


def test_fills_of_a_large_pool_are_drawn_without_listing_it():
    passages = 1 << 40
    ids, fills = draw(np.array([5, 6]), np.array([6, -1]), 4, passages, np.random.default_rng(0))
    assert fills == 3 and len(set(ids.tolist())) == 4 and ids[0] == 5 and 6 not in ids


def test_every_allowed_passage_can_be_a_fill():
    seen = set()
    for seed in range(200):
        ids, _ = draw(np.array([], int), np.array([0]), 2, 6, np.random.default_rng(seed))
        seen |= set(ids.tolist())
    assert seen == {1, 2, 3, 4, 5}
