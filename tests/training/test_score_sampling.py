"""Samples of query-passage scores for the report."""

import numpy as np
import torch

from raybge.data.step_batch import Groups, StepBatch
from raybge.training import score_sampling
from raybge.training.score_sampling import sample_scores


def make_batch(passages: list[int], keys: np.ndarray | None = None) -> StepBatch:
    """Build a batch of groups with these numbers of passages; equal keys mark copies of a passage."""
    ids = [np.zeros(3, np.int64)] * (len(passages) + sum(passages))
    groups = Groups(np.array(passages, np.int64), passage_key_M=keys)
    return StepBatch(0, [(0, i) for i in range(len(passages))], ids, groups)


def test_scores_by_kind():
    """Groups of 3 and 2 passages; the fourth passage is a copy of the first query's positive."""
    q, p = [[1.0, 0.0], [0.0, 1.0]], [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    random_state = torch.get_rng_state()
    plain = sample_scores(4, torch.tensor(q + p), make_batch([3, 2]))
    assert (plain.step, plain.positives, plain.negatives) == (4, [1, 8], [3, 5, 10])
    assert plain.others == [7, 9, 2, 4, 6]
    with_copy = sample_scores(4, torch.tensor(q + p), make_batch([3, 2], keys=np.array([1, 2, 3, 1, 4])))
    assert (with_copy.positives, with_copy.negatives, with_copy.others) == ([1, 8], [3, 5, 10], [9, 4, 6])
    empty = sample_scores(4, torch.zeros(0, 2), make_batch([]))
    assert (empty.positives, empty.negatives, empty.others) == ([], [], [])
    assert torch.equal(torch.get_rng_state(), random_state)


def test_sample_size_is_limited(monkeypatch):
    monkeypatch.setattr(score_sampling, "QUERIES", 4)
    monkeypatch.setattr(score_sampling, "SAMPLE_SIZE", 10)
    scores = sample_scores(1, torch.randn(8 + 80, 3), make_batch([10] * 8))
    assert len(scores.positives) == 4 and 5 < len(scores.negatives) <= 10 and 5 < len(scores.others) <= 10
