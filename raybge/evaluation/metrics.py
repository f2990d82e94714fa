"""Retrieval metrics by trec_eval's definitions (pytrec-eval-terrier); a passage of grade 1 or more is relevant.

- MRR@k: reciprocal rank of the first relevant passage among the first k, else 0.
- Recall@k: relevant passages among the first k, divided by all relevant passages; RecallCap@k: divided by at most k.
- Precision@k: relevant passages among the first k, divided by k. HitRate@k: 1 if there is one, else 0.
- nDCG@k: the gain is the grade, the discount log2(rank + 1).
- MAP@k: precision at each relevant passage among the first k, averaged over all relevant passages.
- AUC@k: as FlagEmbedding prints it, one number for all queries: the probability that a relevant passage among the first
  k scores above another passage among the first k, of the same query or of others.

numpy is imported where it is used: METRICS is read by commands before they import it.

Letters in array names: Q queries, K ranks, R retrieved relevant passages, O other retrieved passages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

METRICS = ("nDCG@10", "MRR@10")  # the main metrics; the first one decides searches and comparisons of queries
CUTOFFS = (1, 10, 100)
_TREC = {"nDCG": "ndcg_cut", "Recall": "recall", "MAP": "map_cut", "Precision": "P", "HitRate": "success"}


def measure(
    ids_QK: np.ndarray,
    relevant: Sequence[Mapping[int, int]],
    absent: Sequence[Sequence[int]],
    cutoffs: Sequence[int],
) -> dict[str, np.ndarray]:
    """Measure each query.

    Args:
        ids_QK: passage ids by rank; -1 for an empty rank.
        relevant: grades of each query's judged passages in the corpus, by id.
        absent: grades of each query's judged passages that the corpus lacks: they are never retrieved.
        cutoffs: ranks at which to measure, at most K.

    Returns:
        The metrics by name, such as "nDCG@10", each (Q,) float64.
    """
    import numpy as np
    import pytrec_eval

    names = [f"{number}" for number in range(len(ids_QK))]  # row numbers, since queries with equal texts are distinct
    qrels = {
        name: {str(i): grade for i, grade in ids.items()} | {f"absent-{j}": grade for j, grade in enumerate(missing)}
        for name, ids, missing in zip(names, relevant, absent, strict=True)
    }
    # The negative rank is the score: ties are ordered already, and trec_eval would order them by name.
    runs = {
        name: {str(i): -float(rank) for rank, i in enumerate(row) if i >= 0}
        for name, row in zip(names, ids_QK.tolist(), strict=True)
    }
    at = ",".join(str(cutoff) for cutoff in cutoffs)
    results = pytrec_eval.RelevanceEvaluator(qrels, {f"{m}.{at}" for m in _TREC.values()}).evaluate(runs)
    values = {
        f"{metric}@{cutoff}": np.array([results[name][f"{trec}_{cutoff}"] for name in names])
        for metric, trec in _TREC.items()
        for cutoff in cutoffs
    }
    relevant_Q = np.array([sum(grade > 0 for grade in judged.values()) for judged in qrels.values()])
    reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"})
    for cutoff in cutoffs:
        limit_Q = np.maximum(np.minimum(relevant_Q, cutoff), 1)
        values[f"RecallCap@{cutoff}"] = values[f"Precision@{cutoff}"] * cutoff / limit_Q
        truncated = {name: {i: s for i, s in run.items() if s > -cutoff} for name, run in runs.items()}
        results = reciprocal.evaluate(truncated)
        values[f"MRR@{cutoff}"] = np.array([results[name]["recip_rank"] for name in names])
    return values


def retrieval_metrics(log_entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the retrieval metrics of an entry of the Trainer's log by name, without the prefix "eval_"."""
    return {
        name.removeprefix("eval_"): value
        for name, value in log_entry.items()
        if name.startswith("eval_") and "@" in name
    }


def area_under_curve(relevant_R: np.ndarray, other_O: np.ndarray) -> float:
    """Return the probability that a score of `relevant_R` exceeds one of `other_O`; ties count half. Undefined: nan."""
    import numpy as np

    if not len(relevant_R) or not len(other_O):
        return float("nan")
    other_O = np.sort(other_O)
    below_R, not_above_R = (np.searchsorted(other_O, relevant_R, side) for side in ("left", "right"))
    return float((below_R + not_above_R).mean() / 2 / len(other_O))
