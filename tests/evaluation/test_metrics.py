"""Metrics against cases worked out by hand."""

from math import log2

import numpy as np
import pytest
import pytrec_eval

from raybge.evaluation.metrics import area_under_curve, measure


def one(ids, relevant, absent=0, cutoffs=(1, 10)):
    values = measure(np.array([ids]), [dict.fromkeys(relevant, 1)], [[1] * absent], cutoffs)
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
        "Precision@1": 0,
        "Precision@10": pytest.approx(0.1),
        "HitRate@1": 0,
        "HitRate@10": 1,
        "RecallCap@1": 0,
        "RecallCap@10": 1,
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
    found = one([1, 2], [1, 2, 3, 4], cutoffs=(1,))
    assert found["Recall@1"] == 0.25 and found["RecallCap@1"] == 1


def test_ranks_count_and_not_names():
    # trec_eval would break ties by name, "9" before "10"
    assert one([10, 9], [10], cutoffs=(1,))["MRR@1"] == 1
    assert one([9, 10], [9], cutoffs=(1,))["MRR@1"] == 1


def test_empty_places_and_several_queries():
    values = measure(np.array([[4, -1], [5, 4]]), [{4: 1}, {4: 1}], [[], []], (1,))
    assert values["MRR@1"].tolist() == [1, 0] and values["nDCG@1"].tolist() == [1, 0]


def test_grades_weigh_and_below_one_is_not_relevant():
    [found] = [measure(np.array([[5, 6, 7, 8]]), [{6: 1, 7: 3, 8: 0, 5: -1}], [[2]], (4,))]
    gain = 1 / log2(3) + 3 / log2(4)
    assert found["nDCG@4"] == pytest.approx(gain / (3 + 2 / log2(3) + 1 / log2(4)))
    assert found["Recall@4"] == pytest.approx(2 / 3) and found["Precision@4"] == 0.5 and found["MRR@4"] == 0.5


def test_a_thousand_random_runs_equal_trec_eval():
    """Scores with many ties, graded judgements, judged passages that are not found; ties go by id, given as ranks."""
    random, cutoffs = np.random.default_rng(0), (1, 3, 10, 20)
    ids_QK, relevant, absent, runs, wanted = [], [], [], {}, {}
    for query in range(1000):
        pool = random.permutation(60)[: random.integers(20, 60)]
        scores = random.integers(0, 6, len(pool))
        ranked = pool[np.lexsort((pool, -scores))][:20]
        grades = {int(i): int(g) for i, g in zip(random.permutation(60)[:12], random.integers(0, 4, 12), strict=True)}
        gone = random.integers(0, 4, random.integers(0, 3)).tolist()
        if not any(grade > 0 for grade in grades.values()):
            grades[0] = 1
        ids_QK.append(ranked), relevant.append(grades), absent.append(gone)
        # three digits: trec_eval reads scores as 32-bit numbers
        runs[str(query)] = {f"p{i}": 1 - rank / 1000 for rank, i in enumerate(ranked.tolist())}
        wanted[str(query)] = {f"p{i}": g for i, g in grades.items()} | {f"g{j}": g for j, g in enumerate(gone)}
    found = measure(np.stack(ids_QK), relevant, absent, cutoffs)
    at = ",".join(map(str, cutoffs))
    names = {"nDCG": "ndcg_cut", "Recall": "recall", "MAP": "map_cut", "Precision": "P", "HitRate": "success"}
    theirs = pytrec_eval.RelevanceEvaluator(wanted, {f"{name}.{at}" for name in names.values()} | {"recip_rank"})
    values = theirs.evaluate(runs)
    for ours, name in names.items():
        for k in cutoffs:
            expected = [values[str(query)][f"{name}_{k}"] for query in range(1000)]
            np.testing.assert_allclose(found[f"{ours}@{k}"], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["MRR@20"], [values[str(query)]["recip_rank"] for query in range(1000)])
    for k in cutoffs:  # a definition of its own
        hits = [sum(each.get(i, 0) > 0 for i in row[:k].tolist()) for each, row in zip(relevant, ids_QK, strict=True)]
        most = [min(k, sum(g > 0 for g in [*r.values(), *a])) for r, a in zip(relevant, absent, strict=True)]
        np.testing.assert_allclose(found[f"RecallCap@{k}"], np.array(hits) / most)


@pytest.mark.parametrize("levels", [3, 1000])
def test_area_under_the_curve(levels):
    random = np.random.default_rng(levels)
    relevant, other = random.integers(0, levels, 40) + levels / 5, random.integers(0, levels, 300)
    pairs = (relevant[:, None] > other[None]) + 0.5 * (relevant[:, None] == other[None])
    assert area_under_curve(relevant, other) == pytest.approx(pairs.mean(), abs=1e-12)
    assert np.isnan(area_under_curve(relevant, other[:0])) and np.isnan(area_under_curve(relevant[:0], other))
