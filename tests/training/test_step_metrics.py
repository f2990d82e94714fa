"""Recording of the updates: each of them once, in bounded memory."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from raybge.data.step_batch import Groups, StepBatch
from raybge.training import step_metrics
from raybge.training.step_metrics import StepRecorder


def make_batch(passages: list[int], tokens: int = 3) -> StepBatch:
    """Build a batch of groups with these numbers of passages; each text has `tokens` tokens."""
    ids = [np.zeros(tokens, np.int64)] * (len(passages) + sum(passages))
    return StepBatch(0, [(0, i) for i in range(len(passages))], ids, Groups(np.array(passages, np.int64)))


@pytest.fixture
def clock(monkeypatch):
    """Return a list of one number, the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(step_metrics.time, "monotonic", lambda: now[0])
    return now


def test_every_update_has_loss_time_and_tokens(clock):
    """An update has two steps; losses are resolved on request only, and evaluations do not count as its time."""
    recorder = StepRecorder()
    clock[0] = 10.0
    recorder.start()
    for number, (losses, rows) in enumerate([((2.0, 4.0), (1, 2)), ((3.0, 0.0), (3, 0)), ((0.0, 0.0), (0, 0))], 1):
        for loss, row in zip(losses, rows, strict=True):
            recorder.add_step(torch.tensor(loss), make_batch([2] * row))
        clock[0] += number
        with recorder.paused():
            clock[0] += 100
        recorder.add_update(number, number / 10)
        assert len(recorder.spans) == (0 if number < 3 else 2)
        if number == 2:
            assert recorder.resolve() == pytest.approx(9 / 6)
    assert math.isnan(recorder.resolve()) and math.isnan(recorder.resolve())
    assert [span.loss for span in recorder.spans[:2]] == [2.0, 1.0] and math.isnan(recorder.spans[2].loss)
    assert [(s.first, s.last, s.rate, s.seconds) for s in recorder.spans] == [(n, n, n / 10, n) for n in (1, 2, 3)]
    assert [(span.queries, span.tokens) for span in recorder.spans] == [(3, 27), (3, 27), (0, 0)]


def test_many_updates_are_merged(monkeypatch, clock):
    monkeypatch.setattr(step_metrics, "MAX_SPANS", 8)
    recorder = StepRecorder()
    for number in range(1, 101):
        rows = number % 3
        recorder.add_step(torch.tensor(2.0 * rows), make_batch([1] * rows))
        clock[0] += 1
        recorder.add_norm(torch.tensor(float(number)))
        recorder.add_update(number, 1 / number)
        recorder.resolve()
        assert len(recorder.spans) <= 8
    spans = recorder.spans
    assert (spans[0].first, spans[-1].last) == (1, 100)
    assert all(a.last + 1 == b.first for a, b in pairwise(spans))
    assert all(span.loss == pytest.approx(2.0) for span in spans if span.queries)
    assert sum(span.queries for span in spans) == 100 and sum(span.tokens for span in spans) == 600
    assert sum(span.seconds for span in spans) == 100
    assert spans[-1].rate == 1 / 100
    assert sum(span.norm * span.updates for span in spans) == pytest.approx(5050)
