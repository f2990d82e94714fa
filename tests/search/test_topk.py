"""Merging candidate lists: the best of all, ties by passage id, for any order of the lists."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raybge.search.topk import merge

# few distinct scores, so that ties are frequent
lists = st.lists(
    st.lists(st.tuples(st.sampled_from([-1.5, 0.0, 0.25, 0.25000003, 1.0]), st.integers(-1, 30)), max_size=8),
    min_size=1,
    max_size=4,
)


@given(lists, st.integers(1, 12), st.randoms())
def test_merge_equals_sorting_everything(candidates, k, random):
    parts = [
        (
            np.array([[s for s, _ in part]], np.float32).reshape(1, -1),
            np.array([[i for _, i in part]], np.int64).reshape(1, -1),
        )
        for part in candidates
    ]
    random.shuffle(parts)
    scores, ids = merge(parts, k)
    everything = [(-np.float32(s), i) for part in candidates for s, i in part if i >= 0]
    expected = sorted(everything)[:k]
    assert ids[0].tolist() == [i for _, i in expected] + [-1] * (k - len(expected))
    assert scores[0, : len(expected)].tolist() == [-s for s, _ in expected]
    assert np.isneginf(scores[0, len(expected) :]).all()


def test_rows_stay_separate_and_types_are_preserved():
    left = np.array([[0.5, 0.1], [0.9, 0.8]], np.float32), np.array([[4, 1], [2, 9]])
    right = np.array([[0.5], [0.1]], np.float32), np.array([[3], [0]])
    scores, ids = merge([left, right], 2)
    assert ids.tolist() == [[3, 4], [2, 9]]
    assert scores.dtype == np.float32 and scores.tolist() == [[0.5, 0.5], [np.float32(0.9), np.float32(0.8)]]
