"""Samples of query-passage scores at the beginning and the end of training, and counts of negatives, for the report.

Shape suffixes: N texts of the batch (queries, then passages), D dimensions, B queries, b the first QUERIES of them,
M passages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from raybge.data.step_batch import StepBatch
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.losses.negative_counts import count_negatives
from raybge.training.measurements import BatchScores, NegativeCounts

QUERIES, SAMPLE_SIZE = 256, 2000  # queries used of a step; scores kept of each kind
COUNTED_STEPS = 100  # of a run, in which negatives are counted


class ScoreSampler:
    """Samples the scores of the first and the last update on this worker.

    Args:
        model: the model that is trained, without its wrappers; of a model that is not contrastive nothing is sampled.

    Attributes:
        samples: scores of the first update, then of the last.
    """

    def __init__(self, model: Any):
        self.samples: list[BatchScores] = []
        self._counts: list[tuple[int, Tensor]] = []  # numbers only at the end: to convert them waits for the device
        self._model = model

    @contextlib.contextmanager
    def sampling(self, updates: int, max_updates: int) -> Iterator[None]:
        """Sample the forward pass in the block if it belongs to the first or the last update, and count negatives.

        This worker may have no rows in the last step of an epoch: then the sample of the step before is kept.

        Args:
            updates: updates done.
            max_updates: updates of the whole run.
        """
        if not isinstance(self._model, ContrastiveModel):
            yield
            return
        model = self._model
        if updates % max(1, max_updates // COUNTED_STEPS) == 0:
            model.negatives_hook = lambda *batch: self._counts.append((updates + 1, count_negatives(*batch)))
        is_sampled = not self.samples or (updates != self.samples[0].step - 1 and updates >= max_updates - 2)
        scores: list[BatchScores] = []
        if is_sampled:
            model.embedding_hook = lambda e_ND, batch: scores.append(sample_scores(updates + 1, e_ND, batch))
        try:
            yield
        finally:
            model.embedding_hook = model.negatives_hook = None
        if scores and scores[0].positives:
            self.samples = [*self.samples[:1], *scores]

    def negatives(self) -> list[NegativeCounts]:
        """Return the counts of negatives; waits for the device."""
        counts = [(step, *count_C.tolist()) for step, count_C in self._counts]
        return [NegativeCounts(*each) for each in counts if each[1]]


def sample_scores(step: int, e_ND: Tensor, batch: StepBatch) -> BatchScores:
    """Sample the scores between the queries and passages of one worker's share of a step.

    Args:
        step: number of the step, counted from 1.
        e_ND: embeddings, first of the share's B queries, then of its M passages.
        batch: the share.

    Returns:
        Scores of the first QUERIES queries with all passages, at most SAMPLE_SIZE of each kind. Copies of a query's
        positive elsewhere in the batch are left out.
    """
    device, B = e_ND.device, len(batch.groups.passages_B)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        score_bM = e_ND[: min(B, QUERIES)].float() @ e_ND[B:].float().T
    passages_B = torch.from_numpy(batch.groups.passages_B).to(device)
    group_M = torch.repeat_interleave(passages_B)
    b = torch.arange(len(score_bM), device=device)
    first_b = (passages_B.cumsum(0) - passages_B)[: len(b)]
    own_bM = group_M == b[:, None]
    copy_bM = torch.arange(len(group_M), device=device) == first_b[:, None]
    if batch.groups.passage_key_M is not None:
        key_M = torch.from_numpy(batch.groups.passage_key_M).to(device)
        copy_bM |= key_M == key_M[first_b][:, None]
    kinds = score_bM[b, first_b], score_bM[own_bM & ~copy_bM], score_bM[~own_bM & ~copy_bM]
    return BatchScores(step, *(_sample(values) for values in kinds))


def _sample(values: Tensor) -> list[float]:
    """Return values at even distances: no random number is drawn."""
    return values[:: max(1, -(-len(values) // SAMPLE_SIZE))].tolist()
