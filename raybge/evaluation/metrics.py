"""Retrieval metrics by trec_eval's definitions (pytrec-eval-terrier); a passage of grade 1 or more is relevant.

MRR@k: one over the rank of the first relevant passage among the first k, else 0. Recall@k: relevant ones among the
first k, over all relevant passages; RecallCap@k: over the k that could be there at most. Precision@k: over k.
HitRate@k: whether there is one. nDCG@k: gain is the grade, discount log2(rank + 1). MAP@k: precision at each relevant
passage among the first k, averaged over all relevant ones. AUC@k, which the recipe prints beside them, is one number
for all queries: of the first k passages of each, the chance that a relevant one scores above another, whichever queries
they were found for.

Letters in array names: Q queries, K ranks, R relevant passages found, O others found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

CUTOFFS = (1, 10, 100)
_TREC = {"nDCG": "ndcg_cut", "Recall": "recall", "MAP": "map_cut", "Precision": "P", "HitRate": "success"}


def measure(
    ids_QK: np.ndarray,
    relevant: Sequence[Mapping[int, int]],
    absent: Sequence[Sequence[int]],
    cutoffs: Sequence[int],
) -> dict[str, np.ndarray]:
    """Metrics of each query, by name ("nDCG@10"), each (Q,) float64.

    Args:
        ids_QK: passage ids in the order of their rank; -1 is an empty place.
        relevant: the grades of each query's judged passages that are in the corpus, by id.
        absent: the grades of each query's judged passages that are not in the corpus: they are never found.
        cutoffs: ranks at which to measure, at most K.
    """
    import pytrec_eval

    names = [f"{number}" for number in range(len(ids_QK))]  # by row: equal texts are distinct queries
    wanted = {
        name: {str(i): grade for i, grade in ids.items()} | {f"absent-{j}": grade for j, grade in enumerate(missing)}
        for name, ids, missing in zip(names, relevant, absent, strict=True)
    }
    # minus the rank as score: the order of ties is settled already, and trec_eval would settle them by name
    runs = {
        name: {str(i): -float(rank) for rank, i in enumerate(row) if i >= 0}
        for name, row in zip(names, ids_QK.tolist(), strict=True)
    }
    at = ",".join(str(cutoff) for cutoff in cutoffs)
    found = pytrec_eval.RelevanceEvaluator(wanted, {f"{m}.{at}" for m in _TREC.values()}).evaluate(runs)
    values = {
        f"{metric}@{cutoff}": np.array([found[name][f"{trec}_{cutoff}"] for name in names])
        for metric, trec in _TREC.items()
        for cutoff in cutoffs
    }
    relevant_Q = np.array([sum(grade > 0 for grade in judged.values()) for judged in wanted.values()])
    reciprocal = pytrec_eval.RelevanceEvaluator(wanted, {"recip_rank"})
    for cutoff in cutoffs:
        most_Q = np.maximum(np.minimum(relevant_Q, cutoff), 1)
        values[f"RecallCap@{cutoff}"] = values[f"Precision@{cutoff}"] * cutoff / most_Q
        cut = {name: {i: s for i, s in run.items() if s > -cutoff} for name, run in runs.items()}
        found = reciprocal.evaluate(cut)
        values[f"MRR@{cutoff}"] = np.array([found[name]["recip_rank"] for name in names])
    return values


def area_under_curve(relevant_R: np.ndarray, other_O: np.ndarray) -> float:
    """The chance that a score of `relevant_R` is above one of `other_O`, ties counted half; nan where one is empty."""
    if not len(relevant_R) or not len(other_O):
        return float("nan")
    other_O = np.sort(other_O)
    below_R, not_above_R = (np.searchsorted(other_O, relevant_R, side) for side in ("left", "right"))
    return float((below_R + not_above_R).mean() / 2 / len(other_O))
