"""Retrieval metrics by trec_eval's definitions (pytrec-eval-terrier).

MRR@k: one over the rank of the first relevant passage among the first k, else 0. Recall@k: over all relevant
passages. nDCG@k: gain 1 for a relevant passage, discount log2(rank + 1). MAP@k: precision at each relevant
passage among the first k, averaged over all relevant ones.

Letters in array names: Q queries, K ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CUTOFFS = (1, 10, 100)
_TREC = {"nDCG": "ndcg_cut", "Recall": "recall", "MAP": "map_cut"}


def measure(
    ids_QK: np.ndarray, relevant: Sequence[Sequence[int]], absent: Sequence[int], cutoffs: Sequence[int]
) -> dict[str, np.ndarray]:
    """Metrics of each query, by name ("nDCG@10"), each (Q,) float64.

    Args:
        ids_QK: passage ids in the order of their rank; -1 is an empty place.
        relevant: the ids of each query's relevant passages that are in the corpus.
        absent: how many of each query's relevant passages are not in the corpus: relevant, but never found.
        cutoffs: ranks at which to measure, at most K.
    """
    import pytrec_eval

    names = [f"{number}" for number in range(len(ids_QK))]  # by row: equal texts are distinct queries
    wanted = {
        name: {str(i): 1 for i in ids} | {f"absent-{j}": 1 for j in range(missing)}
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
    reciprocal = pytrec_eval.RelevanceEvaluator(wanted, {"recip_rank"})
    for cutoff in cutoffs:
        cut = {name: {i: s for i, s in run.items() if s > -cutoff} for name, run in runs.items()}
        found = reciprocal.evaluate(cut)
        values[f"MRR@{cutoff}"] = np.array([found[name]["recip_rank"] for name in names])
    return values
