"""Counts of negatives against a loop over all pairs."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_objective import BANDS, GROUPS, OBJECTIVES, TEACHER, Definition, batch_of, model_of

from raybge.losses import negative_counts
from raybge.losses.negative_counts import CLOSE, count_negatives

NAMES = ("cross-worker", "blocks", "no in-batch", "known masked", "margin", "alone", "everything, joint", "soft_labels")


def counts_of(name: str) -> tuple[list[int], float]:
    """Return the counts of a step, and its loss."""
    model, counts = model_of(name), []
    model.negatives_hook = lambda *batch: counts.append(count_negatives(*batch).tolist())
    loss = model(batch_of(0, GROUPS, alone="alone" in name)).item()
    return counts[0], loss


def by_definition(name: str) -> list[int]:
    model = model_of(name).embedding
    texts = batch_of(0, GROUPS, alone=False).token_ids
    with torch.no_grad():
        vectors = [model.embed([ids], 64)[0] for ids in texts]
    q, p = vectors[:GROUPS], vectors[GROUPS:]
    objective, kinds = OBJECTIVES[name], Counter()
    settings = replace(objective, mask_known=False, margin=None), replace(objective, margin=None), objective
    seen = [Definition(name, q, p, q, p, each) for each in settings]
    for g, first in enumerate(seen[0].first):
        targets = {first}
        if objective.distillation == "soft_labels":
            targets |= {first + i for i, score in enumerate(TEACHER[g]) if score >= BANDS[0][0]}
        for n in (n for n in range(len(p)) if n not in targets):
            all_pairs, unknown, left = (each.is_seen("query_to_doc", g, n) for each in seen)
            close = left and bool(torch.dot(q[g], p[n]) > torch.dot(q[g], p[first]) - CLOSE)
            kinds.update(all=all_pairs, known=all_pairs and not unknown, likely=unknown and not left, close=close)
    return [kinds[kind] for kind in ("all", "known", "likely", "close")]


@pytest.mark.parametrize("pairs", [1 << 22, 24], ids=["whole", "blocks"])
@pytest.mark.parametrize("name", NAMES)
def test_counts_equal_the_definition(monkeypatch, name, pairs):
    monkeypatch.setattr(negative_counts, "_PAIRS", pairs)
    counts, loss = counts_of(name)
    assert counts == by_definition(name)
    assert loss == model_of(name)(batch_of(0, GROUPS, alone="alone" in name)).item()
    assert counts[0] > 0


def test_every_kind_is_counted():
    counts, _ = counts_of("everything, joint")
    assert all(counts)
