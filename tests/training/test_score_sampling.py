"""Samples of query-passage scores for the report."""

import numpy as np
import torch
from transformers import BertConfig, BertModel

from raybge.data.step_batch import Groups, StepBatch
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.losses.objective import Objective
from raybge.model.embedding import EmbeddingModel
from raybge.training import score_sampling
from raybge.training.score_sampling import ScoreSampler, sample_scores


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


def test_negatives_are_counted_in_a_share_of_the_steps():
    """Groups of 3 and 2 passages: 4 negatives of each query."""
    config = BertConfig(**dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8), num_attention_heads=1)
    model = ContrastiveModel(EmbeddingModel(BertModel(config), "cls"), Objective(0.1))
    sampler = ScoreSampler(model)
    for update in range(250):
        with sampler.sampling(update, 250):
            if update < 20:
                model(make_batch([] if update == 2 else [3, 2]))
        assert model.negatives_hook is None and model.embedding_hook is None
    counts = sampler.negatives()
    assert [each.step for each in counts] == [step for step in range(1, 20, 2) if step != 3]
    assert {(each.total, each.known, each.likely) for each in counts} == {(8, 0, 0)}
    assert all(0 <= each.close <= 8 for each in counts)
