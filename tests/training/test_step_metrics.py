"""What a run measures of itself while it trains: every update once, in bounded memory."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from raybge.data.collate import StepBatch
from raybge.evaluation.query_examples import Retrieved, chosen
from raybge.training import step_metrics as step_log
from raybge.training.step_metrics import StepLog, batch_scores


def batch(passages, tokens=3, keys=None):
    ids = [np.zeros(tokens, np.int64)] * (len(passages) + sum(passages))
    return StepBatch(0, [(0, i) for i in range(len(passages))], ids, np.array(passages, np.int64), keys)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(step_log.time, "monotonic", lambda: now[0])
    return now


def test_every_update_has_its_loss_time_and_tokens(clock):
    """Two steps an update, numbers only when they are asked for, and evaluations are not a step's time."""
    log = StepLog()
    clock[0] = 10.0
    log.begin()
    for number, (losses, rows) in enumerate([((2.0, 4.0), (1, 2)), ((3.0, 0.0), (3, 0)), ((0.0, 0.0), (0, 0))], 1):
        for loss, row in zip(losses, rows, strict=True):
            log.step(torch.tensor(loss), batch([2] * row))
        clock[0] += number
        with log.aside():
            clock[0] += 100
        log.update(number, number / 10)
        assert len(log.spans) == (0 if number < 3 else 2)
        if number == 2:
            assert log.resolve() == pytest.approx(9 / 6)
    assert math.isnan(log.resolve()) and math.isnan(log.resolve())
    assert [span.loss for span in log.spans[:2]] == [2.0, 1.0] and math.isnan(log.spans[2].loss)
    assert [(s.first, s.last, s.rate, s.seconds) for s in log.spans] == [(n, n, n / 10, n) for n in (1, 2, 3)]
    assert [(span.queries, span.tokens) for span in log.spans] == [(3, 27), (3, 27), (0, 0)]


def test_many_updates_are_joined(monkeypatch, clock):
    monkeypatch.setattr(step_log, "MOST", 8)
    log = StepLog()
    for number in range(1, 101):
        rows = number % 3
        log.step(torch.tensor(2.0 * rows), batch([1] * rows))
        clock[0] += 1
        log.update(number, 1 / number)
        log.resolve()
        assert len(log.spans) <= 8
    assert (log.spans[0].first, log.spans[-1].last) == (1, 100)
    assert all(a.last + 1 == b.first for a, b in pairwise(log.spans))
    assert all(span.loss == pytest.approx(2.0) for span in log.spans if span.queries)
    assert sum(span.queries for span in log.spans) == 100 and sum(span.tokens for span in log.spans) == 600
    assert sum(span.seconds for span in log.spans) == 100
    assert log.spans[-1].rate == 1 / 100


def test_scores_of_a_step_by_kind():
    """Groups of 3 and 2 passages; the fourth passage is a copy of the first query's positive."""
    q, p = [[1.0, 0.0], [0.0, 1.0]], [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    state = torch.get_rng_state()
    plain = batch_scores(4, torch.tensor(q + p), batch([3, 2]))
    assert (
        plain.step == 4
        and plain.positives == [1, 8]
        and plain.negatives == [3, 5, 10]
        and plain.others == [7, 9, 2, 4, 6]
    )
    found = batch_scores(4, torch.tensor(q + p), batch([3, 2], keys=np.array([1, 2, 3, 1, 4])))
    assert found.positives == [1, 8] and found.negatives == [3, 5, 10] and found.others == [9, 4, 6]
    nothing = batch_scores(4, torch.zeros(0, 2), batch([]))
    assert (nothing.positives, nothing.negatives, nothing.others) == ([], [], [])
    assert torch.equal(torch.get_rng_state(), state)


def test_of_many_scores_a_sample_is_kept(monkeypatch):
    monkeypatch.setattr(step_log, "QUERIES", 4)
    monkeypatch.setattr(step_log, "SAMPLE", 10)
    found = batch_scores(1, torch.randn(8 + 80, 3), batch([10] * 8))
    assert len(found.positives) == 4 and 5 < len(found.negatives) <= 10 and 5 < len(found.others) <= 10


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([0.1, -0.2, 0, 0.3], [3, 1, 0, 2]),
        ([i / 100 for i in range(1, 31)], list(range(29, 9, -1))),
        ([-i / 100 for i in range(1, 31)], list(range(29, 9, -1))),
        ([0.5] * 15 + [-0.1] * 15, list(range(10)) + list(range(15, 25))),
        ([0.5] * 28 + [-0.1] * 2, [*range(18), 28, 29]),
    ],
)
def test_the_largest_gains_and_losses_are_chosen(changes, expected):
    after = np.array(changes)
    first, last = (Retrieved({"nDCG@10": values}, np.zeros((len(after), 10))) for values in (0 * after, after))
    assert chosen(first, last) == expected
