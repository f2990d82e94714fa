"""Choice of negatives: ranks, excluded passages, score rules, random fills; against sets and plain loops."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybge.mining.sampling import RowCandidates, SamplingSpec, sample


def row(ids, scores=None, excluded=(), positives=(1.0,), seed=0):
    scores = np.linspace(0.9, 0.1, len(ids)) if scores is None else scores
    arrays = np.array(ids, np.int64), np.array(scores, np.float32), np.array(excluded, np.int64)
    return RowCandidates(*arrays, np.array(positives, np.float32), np.random.default_rng(seed))


def no_scores(row_N, ids_N):
    raise AssertionError("scores were requested")


def one(row, sampling, passages=1000, score=no_scores):
    (negatives,) = sample([row], sampling, passages, score)
    return negatives.ids.tolist(), negatives.fills


@given(
    st.lists(st.integers(0, 30), unique=True, max_size=20),
    st.lists(st.integers(-1, 30), max_size=10),
    st.integers(1, 25),
    st.sampled_from([31, 40, 5000]),
    st.sampled_from(["random", "top"]),
)
def test_negatives_are_distinct_not_excluded_and_candidates_first(ids, excluded, number, passages, strategy):
    negatives, fills = one(row(ids, excluded=excluded), SamplingSpec(0, 20, number, strategy=strategy), passages)
    free = [i for i in ids if i not in excluded]
    assert len(set(negatives)) == len(negatives) and not set(negatives) & set(excluded)
    assert len(negatives) == min(number, len(set(range(passages)) - set(excluded)))
    assert fills == len(negatives) - min(number, len(free))
    border = len(negatives) - fills
    assert set(negatives[:border]) <= set(free) and not set(negatives[border:]) & set(free)
    if strategy == "top":
        assert negatives[:border] == free[:number]


def test_sample_does_not_depend_on_candidate_order():
    negatives = [one(row(ids), SamplingSpec(0, 9, 3))[0] for ids in ([4, 7, 1, 9, 2], [9, 1, 2, 4, 7])]
    assert negatives[0] == negatives[1]
    assert one(row([4, 7, 1, 9, 2], seed=1), SamplingSpec(0, 9, 3))[0] != negatives[0]


def test_top_takes_highest_scores_then_lowest_id():
    assert one(row([5, 3, 8, 1], [0.2, 0.7, 0.7, 0.1]), SamplingSpec(0, 4, 3, strategy="top")) == ([3, 8, 5], 0)


@pytest.mark.parametrize(
    ("rules", "positives", "allowed"),
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
def test_score_rules(rules, positives, allowed):
    scores = np.array([0.9, 0.75, 0.6, 0.5, 0.1, -0.3])
    allowed_C = SamplingSpec(0, 6, 6, **rules).allows(scores, np.array(positives))
    assert scores[allowed_C].tolist() == allowed


@pytest.mark.parametrize("strategy", ["random", "top"])
def test_fills_obey_the_same_score_rules(strategy):
    """Passage i has the score i / 1000, the positive 0.7: with a margin of 0.2, 0 to 500 may be negatives."""
    sampling = SamplingSpec(0, 4, 12, strategy=strategy, absolute_margin=0.2, min_score=0.05)
    calls = []

    def score(row_N, ids_N):
        calls.append(len(ids_N))
        assert row_N.tolist() == sorted(row_N.tolist()) and set(row_N.tolist()) == {0, 1}
        return ids_N / 1000

    rows = [row([900, 600, 450, 300], [0.9, 0.6, 0.45, 0.3], excluded=[451], positives=[0.7], seed=n) for n in (0, 1)]
    for negatives in sample(rows, sampling, 1000, score):
        assert set(negatives.ids[:2].tolist()) == {450, 300} and negatives.fills == 10 == len(negatives.ids) - 2
        assert all(50 <= i <= 500 and i != 451 for i in negatives.ids) and len(set(negatives.ids.tolist())) == 12
    assert len(calls) == 1


def test_no_fill_if_scores_rule_out_everything():
    sampling = SamplingSpec(0, 4, 5, max_score=-1.0)
    assert one(row([1, 2, 3]), sampling, 50, lambda rows, ids: np.zeros(len(ids))) == ([], 0)


def test_describe_names_the_rules():
    line = SamplingSpec(2, 200, 7, 42, "top", relative_margin=0.05).describe()
    assert line == "7 negatives per row, top, from ranks 2 to 199, relative_margin 0.05, seed 42"
    assert {field.name for field in dataclasses.fields(SamplingSpec)} >= {"absolute_margin", "max_score", "min_score"}
