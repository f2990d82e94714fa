"""Metrics against cases worked out by hand."""

from math import log2

import numpy as np
import pytest

from raybge.metrics import measure


def one(ids, relevant, absent=0, cutoffs=(1, 10)):
    values = measure(np.array([ids]), [relevant], [absent], cutoffs)
    return {name: float(value[0]) for name, value in values.items()}


def test_one_answer_at_the_third_rank():
    found = one([7, 8, 9, 4], [9])
    assert found == {
        "nDCG@1": 0,
        "nDCG@10": pytest.approx(1 / log2(4)),
        "Recall@1": 0,
        "Recall@10": 1,
        "MAP@1": 0,
        "MAP@10": pytest.approx(1 / 3),
        "MRR@1": 0,
        "MRR@10": pytest.approx(1 / 3),
    }


def test_two_answers_one_of_them_found():
    found = one([3, 1], [1, 2])
    assert found["Recall@10"] == 0.5 and found["MRR@10"] == 0.5
    assert found["MAP@10"] == pytest.approx((1 / 2) / 2)
    assert found["nDCG@10"] == pytest.approx((1 / log2(3)) / (1 + 1 / log2(3)))


def test_an_answer_that_the_corpus_lacks_counts_as_not_found():
    found = one([1], [1], absent=1)
    assert found["Recall@10"] == 0.5 and found["MRR@1"] == 1 and found["MAP@10"] == 0.5
    assert one([5, 6], [], absent=1) == dict.fromkeys(found, 0)


def test_reciprocal_rank_is_cut_at_its_rank():
    ids = list(range(100))
    found = one(ids, [10], cutoffs=(1, 10, 100))  # rank 11
    assert found["MRR@10"] == 0 and found["MRR@100"] == pytest.approx(1 / 11)
    assert one(ids, [9], cutoffs=(10,))["MRR@10"] == pytest.approx(1 / 10)


def test_recall_is_over_all_relevant_not_over_k():
    assert one([1, 2], [1, 2, 3, 4], cutoffs=(1,))["Recall@1"] == 0.25


def test_ranks_count_and_not_names():
    # trec_eval would break ties by name, "9" before "10"
    assert one([10, 9], [10], cutoffs=(1,))["MRR@1"] == 1
    assert one([9, 10], [9], cutoffs=(1,))["MRR@1"] == 1


def test_empty_places_and_several_queries():
    values = measure(np.array([[4, -1], [5, 4]]), [[4], [4]], [0, 0], (1,))
    assert values["MRR@1"].tolist() == [1, 0] and values["nDCG@1"].tolist() == [1, 0]
