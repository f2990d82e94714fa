"""Measurements of a training run, as its report reads them. This module imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class UpdateSpan:
    """One update of the weights, or several consecutive ones.

    Args:
        first: Number of the first update, counted from 1.
        last: Number of the last update.
        loss: Mean loss of one worker's queries.
        queries: Number of these queries.
        rate: Learning rate of the last update.
        seconds: Duration of all these updates.
        tokens: Tokens of one worker in all these updates.
        norm: Mean norm of the gradients, before they are clipped; nan if unknown.
    """

    first: int
    last: int
    loss: float
    queries: int
    rate: float
    seconds: float
    tokens: int
    norm: float = math.nan

    @property
    def updates(self) -> int:
        """Number of updates."""
        return self.last - self.first + 1

    @property
    def middle(self) -> float:
        """Mean of the first and the last number."""
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class BatchScores:
    """Inner products of queries and passages in one worker's share of a step, a sample of each kind.

    Args:
        step: Number of the step, counted from 1.
        positives: Of queries with their positives.
        negatives: Of queries with their own groups' negatives.
        others: Of queries with other groups' passages.
    """

    step: int
    positives: Sequence[float]
    negatives: Sequence[float]
    others: Sequence[float]


@dataclass(frozen=True)
class NegativeCounts:
    """Negatives of one worker's queries in a step, among the passages of all workers.

    Args:
        step: Number of the step, counted from 1.
        total: Pairs of a query and a passage that are negatives by their position in the batch.
        known: Of these, masked because the data states the passage to be relevant.
        likely: Of the others, masked by the margin.
        close: Of those that are left, with a cosine close to that of the positive.
    """

    step: int
    total: int
    known: int
    likely: int
    close: int
