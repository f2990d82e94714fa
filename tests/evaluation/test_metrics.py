"""Metrics of cases computed by hand, and of random runs against trec_eval."""

from math import log2

import numpy as np
import pytest
import pytrec_eval

from raybge.evaluation.metrics import METRICS, area_under_curve, measure, retrieval_metrics


def one(ids, relevant, absent=0, cutoffs=(1, 10)):
    values = measure(np.array([ids]), [dict.fromkeys(relevant, 1)], [[1] * absent], cutoffs)
    return {name: float(value[0]) for name, value in values.items()}


def test_one_answer_at_the_third_rank():
    values = one([7, 8, 9, 4], [9])
    assert values == {
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


def test_retrieval_metrics_of_a_log_entry():
    entry = {"eval_nDCG@10": 0.5, "eval_MRR@10": 0.25, "eval_runtime": 3.0, "loss": 1.0, "train@10": 1.0, "step": 4}
    assert retrieval_metrics(entry) == dict(zip(METRICS, (0.5, 0.25), strict=True))


def test_two_answers_one_retrieved():
    values = one([3, 1], [1, 2])
    assert values["Recall@10"] == 0.5 and values["MRR@10"] == 0.5
    assert values["MAP@10"] == pytest.approx((1 / 2) / 2)
    assert values["nDCG@10"] == pytest.approx((1 / log2(3)) / (1 + 1 / log2(3)))


def test_answer_absent_from_the_corpus_counts_as_not_retrieved():
    values = one([1], [1], absent=1)
    assert values["Recall@10"] == 0.5 and values["MRR@1"] == 1 and values["MAP@10"] == 0.5
    assert one([5, 6], [], absent=1) == dict.fromkeys(values, 0)


def test_reciprocal_rank_is_limited_to_the_cutoff():
    ids = list(range(100))
    values = one(ids, [10], cutoffs=(1, 10, 100))  # rank 11
    assert values["MRR@10"] == 0 and values["MRR@100"] == pytest.approx(1 / 11)
    assert one(ids, [9], cutoffs=(10,))["MRR@10"] == pytest.approx(1 / 10)


def test_recall_is_over_all_relevant_not_over_k():
    values = one([1, 2], [1, 2, 3, 4], cutoffs=(1,))
    assert values["Recall@1"] == 0.25 and values["RecallCap@1"] == 1


def test_ties_are_not_reordered_by_name():
    # trec_eval would break ties by name, "9" before "10"
    assert one([10, 9], [10], cutoffs=(1,))["MRR@1"] == 1
    assert one([9, 10], [9], cutoffs=(1,))["MRR@1"] == 1


def test_empty_ranks_and_several_queries():
    values = measure(np.array([[4, -1], [5, 4]]), [{4: 1}, {4: 1}], [[], []], (1,))
    assert values["MRR@1"].tolist() == [1, 0] and values["nDCG@1"].tolist() == [1, 0]


def test_grades_are_gains_and_below_one_is_not_relevant():
    values = measure(np.array([[5, 6, 7, 8]]), [{6: 1, 7: 3, 8: 0, 5: -1}], [[2]], (4,))
    gain = 1 / log2(3) + 3 / log2(4)
    assert values["nDCG@4"] == pytest.approx(gain / (3 + 2 / log2(3) + 1 / log2(4)))
    assert values["Recall@4"] == pytest.approx(2 / 3) and values["Precision@4"] == 0.5 and values["MRR@4"] == 0.5


def test_random_runs_equal_trec_eval():
    """Scores with many ties, graded judgments, absent judged passages; ties are ordered by id."""
    random, cutoffs = np.random.default_rng(0), (1, 3, 10, 20)
    ids_QK, relevant, absent, runs, qrels = [], [], [], {}, {}
    for query in range(1000):
        pool = random.permutation(60)[: random.integers(20, 60)]
        scores = random.integers(0, 6, len(pool))
        ranked = pool[np.lexsort((pool, -scores))][:20]
        grades = {int(i): int(g) for i, g in zip(random.permutation(60)[:12], random.integers(0, 4, 12), strict=True)}
        missing = random.integers(0, 4, random.integers(0, 3)).tolist()
        if not any(grade > 0 for grade in grades.values()):
            grades[0] = 1
        ids_QK.append(ranked), relevant.append(grades), absent.append(missing)
        # three digits: trec_eval reads scores as 32-bit numbers
        runs[str(query)] = {f"p{i}": 1 - rank / 1000 for rank, i in enumerate(ranked.tolist())}
        qrels[str(query)] = {f"p{i}": g for i, g in grades.items()} | {f"g{j}": g for j, g in enumerate(missing)}
    metrics = measure(np.stack(ids_QK), relevant, absent, cutoffs)
    at = ",".join(map(str, cutoffs))
    names = {"nDCG": "ndcg_cut", "Recall": "recall", "MAP": "map_cut", "Precision": "P", "HitRate": "success"}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {f"{name}.{at}" for name in names.values()} | {"recip_rank"})
    values = evaluator.evaluate(runs)
    for ours, name in names.items():
        for k in cutoffs:
            expected = [values[str(query)][f"{name}_{k}"] for query in range(1000)]
            np.testing.assert_allclose(metrics[f"{ours}@{k}"], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(metrics["MRR@20"], [values[str(query)]["recip_rank"] for query in range(1000)])
    for k in cutoffs:  # not a metric of trec_eval
        hits = [sum(each.get(i, 0) > 0 for i in row[:k].tolist()) for each, row in zip(relevant, ids_QK, strict=True)]
        limits = [min(k, sum(g > 0 for g in [*r.values(), *a])) for r, a in zip(relevant, absent, strict=True)]
        np.testing.assert_allclose(metrics[f"RecallCap@{k}"], np.array(hits) / limits)


@pytest.mark.parametrize("levels", [3, 1000])
def test_area_under_the_curve(levels):
    random = np.random.default_rng(levels)
    relevant, other = random.integers(0, levels, 40) + levels / 5, random.integers(0, levels, 300)
    pairs = (relevant[:, None] > other[None]) + 0.5 * (relevant[:, None] == other[None])
    assert area_under_curve(relevant, other) == pytest.approx(pairs.mean(), abs=1e-12)
    assert np.isnan(area_under_curve(relevant, other[:0])) and np.isnan(area_under_curve(relevant[:0], other))
