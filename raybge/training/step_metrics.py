"""What each update of a training run came to, in bounded memory and without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from raybge.data.collate import StepBatch
from raybge.data.stream import Batch


@dataclass(frozen=True)
class Span:
    """One update, or several that follow one another: numbers `first` to `last`, counted from 1.

    `loss` is the mean of one worker's `queries`, `rate` the learning rate of the last update; `seconds` and `tokens`
    are those of all of them, the tokens one worker's.
    """

    first: int
    last: int
    loss: float
    queries: int
    rate: float
    seconds: float
    tokens: int

    @property
    def updates(self) -> int:
        return self.last - self.first + 1

    @property
    def middle(self) -> float:
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class BatchScores:
    """Scores of queries in one worker's share of a step, a sample of each kind: with their positives, with their own
    groups' negatives, with other groups' passages.
    """

    step: int
    positives: Sequence[float]
    negatives: Sequence[float]
    others: Sequence[float]


MOST = 2000  # spans that are kept; above, each two that are neighbours become one
QUERIES, SAMPLE = 256, 2000  # of a step's scores


class StepLog:
    """Losses come as tensors and become numbers at `resolve`, once for many steps: each time waits for the device."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._losses: list[tuple[Tensor, int]] = []  # of steps since the last `resolve`: sum and queries
        self._ended: list[tuple[int, int, float, float, int]] = []  # of updates: steps, number, rate, seconds, tokens
        self._tokens = 0
        self._since = time.monotonic()

    def begin(self) -> None:
        """The first update begins."""
        self._since = time.monotonic()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done in the block is no part of an update's time."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - start

    def step(self, loss: Tensor, batch: Batch) -> None:
        """One worker's share of a step: the sum of its rows' losses."""
        self._losses.append((loss, len(batch.rows)))
        self._tokens += sum(map(len, batch.token_ids))

    def update(self, number: int, rate: float) -> None:
        """The steps since the last update are one."""
        now = time.monotonic()
        self._ended.append((len(self._losses), number, rate, now - self._since, self._tokens))
        self._since, self._tokens = now, 0

    def resolve(self) -> float:
        """The mean loss of the queries since the last call, nan when there were none."""
        if not self._losses:
            return float("nan")
        sums = torch.stack([loss for loss, _ in self._losses]).double().tolist()
        rows = [count for _, count in self._losses]
        start = 0
        for stop, number, rate, seconds, tokens in self._ended:
            loss, queries = _mean(sums[start:stop], rows[start:stop]), sum(rows[start:stop])
            self.spans.append(Span(number, number, loss, queries, rate, seconds, tokens))
            start = stop
        self._losses, self._ended = [], []
        if len(self.spans) > MOST:
            self.spans = [_joined(self.spans[i : i + 2]) for i in range(0, len(self.spans), 2)]
        return _mean(sums, rows)


def _mean(sums: list[float], rows: list[int]) -> float:
    return sum(sums) / sum(rows) if sum(rows) else float("nan")


def _joined(spans: list[Span]) -> Span:
    seconds, tokens = sum(span.seconds for span in spans), sum(span.tokens for span in spans)
    queries = [span.queries for span in spans]
    loss = _mean([span.loss * span.queries for span in spans if span.queries], queries)
    return Span(spans[0].first, spans[-1].last, loss, sum(queries), spans[-1].rate, seconds, tokens)


def batch_scores(step: int, e_ND: Tensor, batch: StepBatch) -> BatchScores:
    """The scores in a share of a step: of its first QUERIES queries with all its passages, SAMPLE of each kind.

    Args:
        e_ND: embeddings of the share's queries, then of its passages.
    """
    device, B = e_ND.device, len(batch.passages_B)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        score_bM = e_ND[: min(B, QUERIES)].float() @ e_ND[B:].float().T
    passages_B = torch.from_numpy(batch.passages_B).to(device)
    group_M = torch.repeat_interleave(passages_B)
    b = torch.arange(len(score_bM), device=device)
    first_b = (passages_B.cumsum(0) - passages_B)[: len(b)]
    own_bM = group_M == b[:, None]
    copy_bM = torch.arange(len(group_M), device=device) == first_b[:, None]
    if batch.passage_keys_M is not None:
        key_M = torch.from_numpy(batch.passage_keys_M).to(device)
        copy_bM |= key_M == key_M[first_b][:, None]
    kinds = score_bM[b, first_b], score_bM[own_bM & ~copy_bM], score_bM[~own_bM & ~copy_bM]
    return BatchScores(step, *(_sample(values_N) for values_N in kinds))


def _sample(values_N: Tensor) -> list[float]:
    """At even distances: no random number is drawn."""
    return values_N[:: max(1, -(-len(values_N) // SAMPLE))].tolist()
