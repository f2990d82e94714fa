"""Choosing negatives: the range, what is banned, what scores allow, fills; against sets and plain loops."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybge.mining.sampling import Row, Sampling, sample


def row(ids, scores=None, banned=(), positives=(1.0,), seed=0):
    scores = np.linspace(0.9, 0.1, len(ids)) if scores is None else scores
    arrays = np.array(ids, np.int64), np.array(scores, np.float32), np.array(banned, np.int64)
    return Row(*arrays, np.array(positives, np.float32), np.random.default_rng(seed))


def no_score(row_N, ids_N):
    raise AssertionError("nobody asked for scores")


def one(row, sampling, passages=1000, score=no_score):
    (drawn,) = sample([row], sampling, passages, score)
    return drawn.ids.tolist(), drawn.fills


@given(
    st.lists(st.integers(0, 30), unique=True, max_size=20),
    st.lists(st.integers(-1, 30), max_size=10),
    st.integers(1, 25),
    st.sampled_from([31, 40, 5000]),
    st.sampled_from(["random", "top"]),
)
def test_negatives_are_distinct_never_banned_and_from_the_candidates_first(ids, banned, number, passages, strategy):
    drawn, fills = one(row(ids, banned=banned), Sampling(0, 20, number, strategy=strategy), passages)
    free = [i for i in ids if i not in banned]
    assert len(set(drawn)) == len(drawn) and not set(drawn) & set(banned)
    assert len(drawn) == min(number, len(set(range(passages)) - set(banned)))
    assert fills == len(drawn) - min(number, len(free))
    assert set(drawn[: len(drawn) - fills]) <= set(free) and not set(drawn[len(drawn) - fills :]) & set(free)
    if strategy == "top":
        assert drawn[: len(drawn) - fills] == free[:number]


def test_the_same_candidates_in_another_order_give_the_same_sample():
    drawn = [one(row(ids), Sampling(0, 9, 3))[0] for ids in ([4, 7, 1, 9, 2], [9, 1, 2, 4, 7])]
    assert drawn[0] == drawn[1]
    assert one(row([4, 7, 1, 9, 2], seed=1), Sampling(0, 9, 3))[0] != drawn[0]


def test_the_top_are_the_highest_scores_and_then_the_lower_number():
    assert one(row([5, 3, 8, 1], [0.2, 0.7, 0.7, 0.1]), Sampling(0, 4, 3, strategy="top")) == ([3, 8, 5], 0)


@pytest.mark.parametrize(
    ("asked", "positives", "allowed"),
    [
        ({"absolute_margin": 0.2}, [0.8], [0.6, 0.5, 0.1, -0.3]),
        ({"absolute_margin": 0.2}, [0.8, 0.71], [0.5, 0.1, -0.3]),  # below each positive
        ({"relative_margin": 0.25}, [0.8], [0.6, 0.5, 0.1, -0.3]),
        ({"relative_margin": 0.5}, [-0.19], [-0.3]),  # below the positive, also where its score is negative
        ({"max_score": 0.55}, [0.8], [0.5, 0.1, -0.3]),
        ({"min_score": 0.1}, [0.8], [0.9, 0.75, 0.6, 0.5, 0.1]),
        ({"min_score": 0.1, "max_score": 0.6, "absolute_margin": 0.25}, [0.8], [0.5, 0.1]),
    ],
)
def test_scores_decide_what_may_be_a_negative(asked, positives, allowed):
    scores = np.array([0.9, 0.75, 0.6, 0.5, 0.1, -0.3])
    found = Sampling(0, 6, 6, **asked).may_be(scores, np.array(positives))
    assert scores[found].tolist() == allowed


@pytest.mark.parametrize("strategy", ["random", "top"])
def test_fills_are_held_to_the_same_scores(strategy):
    """Passage i has the score i / 1000, the positive 0.7: with a margin of 0.2, 0 to 500 may be negatives."""
    sampling = Sampling(0, 4, 12, strategy=strategy, absolute_margin=0.2, min_score=0.05)
    asked = []

    def score(row_N, ids_N):
        asked.append(len(ids_N))
        assert row_N.tolist() == sorted(row_N.tolist()) and set(row_N.tolist()) == {0, 1}
        return ids_N / 1000

    rows = [row([900, 600, 450, 300], [0.9, 0.6, 0.45, 0.3], banned=[451], positives=[0.7], seed=n) for n in (0, 1)]
    for drawn in sample(rows, sampling, 1000, score):
        assert set(drawn.ids[:2].tolist()) == {450, 300} and drawn.fills == 10 == len(drawn.ids) - 2
        assert all(50 <= i <= 500 and i != 451 for i in drawn.ids) and len(set(drawn.ids.tolist())) == 12
    assert len(asked) == 1


def test_what_scores_rule_out_everywhere_is_not_filled():
    sampling = Sampling(0, 4, 5, max_score=-1.0)
    assert one(row([1, 2, 3]), sampling, 50, lambda rows, ids: np.zeros(len(ids))) == ([], 0)


def test_the_plan_names_what_was_asked():
    said = Sampling(2, 200, 7, 42, "top", relative_margin=0.05).describe()
    assert said == "7 negatives a row, top, from ranks 2 to 199, relative_margin 0.05, seed 42"
    assert {field.name for field in dataclasses.fields(Sampling)} >= {"absolute_margin", "max_score", "min_score"}
