"""Loss, speed and learning rate of each update, recorded in bounded memory and without waiting for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from raybge.data.stream import Batch
from raybge.training.measurements import UpdateSpan

MAX_SPANS = 2000  # above this number, each two neighboring spans are merged


class StepRecorder:
    """Recorder of the updates on one worker.

    Losses arrive as tensors and are converted to numbers in `resolve`, once for many steps: each conversion waits for
    the device.
    """

    def __init__(self) -> None:
        self.spans: list[UpdateSpan] = []
        self._losses: list[tuple[Tensor, int]] = []  # of the steps since the last `resolve`: sum and number of queries
        # Of the updates since the last `resolve`: steps until then, number, learning rate, seconds, tokens, norm.
        self._updates: list[tuple[int, int, float, float, int, Tensor | float]] = []
        self._tokens = 0
        self._norm: Tensor | float = math.nan
        self._started = time.monotonic()

    def start(self) -> None:
        """Start the time of the first update."""
        self._started = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block from the update's time."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._started += time.monotonic() - start

    def add_step(self, loss: Tensor, batch: Batch) -> None:
        """Record one worker's share of a step.

        Args:
            loss: sum of the losses of the share's rows, scalar.
            batch: the share.
        """
        self._losses.append((loss, len(batch.rows)))
        self._tokens += sum(map(len, batch.token_ids))

    def add_norm(self, norm: Tensor | float) -> None:
        """Record the norm of the next update's gradient; a tensor must not be distributed over workers."""
        self._norm = norm

    def add_update(self, number: int, rate: float) -> None:
        """Record that the steps since the last call form an update.

        Args:
            number: number of the update, counted from 1.
            rate: its learning rate.
        """
        now = time.monotonic()
        self._updates.append((len(self._losses), number, rate, now - self._started, self._tokens, self._norm))
        self._started, self._tokens, self._norm = now, 0, math.nan

    def resolve(self) -> float:
        """Append the updates since the last call to `spans`. Waits for the device.

        Returns:
            The mean loss of the queries since the last call; nan if there were none.
        """
        if not self._losses:
            return float("nan")
        sums = torch.stack([loss for loss, _ in self._losses]).double().tolist()
        queries = [count for _, count in self._losses]
        start = 0
        for stop, number, rate, seconds, tokens, norm in self._updates:
            loss, count = _mean(sums[start:stop], queries[start:stop]), sum(queries[start:stop])
            self.spans.append(UpdateSpan(number, number, loss, count, rate, seconds, tokens, float(norm)))
            start = stop
        self._losses, self._updates = [], []
        if len(self.spans) > MAX_SPANS:
            self.spans = [_merge(self.spans[i : i + 2]) for i in range(0, len(self.spans), 2)]
        return _mean(sums, queries)


def _mean(sums: list[float], counts: list[int]) -> float:
    return sum(sums) / sum(counts) if sum(counts) else float("nan")


def _merge(spans: list[UpdateSpan]) -> UpdateSpan:
    seconds, tokens = sum(span.seconds for span in spans), sum(span.tokens for span in spans)
    queries = [span.queries for span in spans]
    loss = _mean([span.loss * span.queries for span in spans if span.queries], queries)
    norms = [(span.norm, span.updates) for span in spans if math.isfinite(span.norm)]
    norm = _mean([norm * updates for norm, updates in norms], [updates for _, updates in norms])
    return UpdateSpan(spans[0].first, spans[-1].last, loss, sum(queries), spans[-1].rate, seconds, tokens, norm)
