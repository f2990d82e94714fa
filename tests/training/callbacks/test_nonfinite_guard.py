"""What is a bad step and what becomes of it, in this process; across workers in test_divergence.py."""

from types import SimpleNamespace

import pytest
import torch
from test_trainer import found, tiny, trainer, weights  # noqa: F401

from raybge.losses.contrastive_model import ContrastiveModel
from raybge.training.callbacks.nonfinite_guard import BadSteps
from raybge.util.errors import UserError

NAN, INF = float("nan"), float("inf")
BATCH = SimpleNamespace(rows=[(0, 10), (0, 20), (1, 30)])


def watcher(limit: int, lines: list[str]) -> BadSteps:
    return BadSteps(limit, ["a.jsonl", "b.jsonl"], lines.append)


def ended(bad: BadSteps, loss: float, norm: float, scaled: bool = False, sound=lambda batch: None) -> bool:
    bad.step(torch.tensor(loss), BATCH)
    return bad.end(torch.tensor(norm), 7, sound, scaled)


@pytest.mark.parametrize(("loss", "norm"), [(1.0, INF), (1.0, NAN), (NAN, NAN)])
def test_only_bad_steps_in_a_row_end_a_run(loss, norm):
    lines: list[str] = []
    bad = watcher(2, lines)
    assert ended(bad, loss, norm)
    assert not ended(bad, 1.0, 3.0)
    assert ended(bad, loss, norm)
    assert len(lines) == 2
    with pytest.raises(UserError, match="2 steps in a row"):
        ended(bad, loss, norm)


def test_a_loss_that_is_not_finite_makes_the_gradient_so():
    """Although its own gradient is finite: it is by the gradient that other workers learn of it."""
    x = torch.tensor(2.0, requires_grad=True)
    watcher(1, []).step(x + INF, BATCH).backward()
    assert x.grad.isnan()


def test_the_gradient_of_a_loss_that_is_finite_is_its_own():
    x = torch.tensor(2.0, requires_grad=True)
    watcher(1, []).step(x**3, BATCH).backward()
    assert x.grad == 12


def test_the_search_for_a_scale_is_no_bad_step():
    """In half precision gradients overflow until the scale fits; a loss that does is another thing."""
    bad = watcher(1, [])
    assert not ended(bad, 1.0, INF, scaled=True)
    with pytest.raises(UserError):
        ended(bad, NAN, INF, scaled=True)


def test_rows_that_are_not_sound_come_first():
    lines: list[str] = []
    ended(watcher(2, lines), NAN, NAN, sound=lambda batch: [True, True, False])
    assert lines[0].endswith("b.jsonl:byte 30, a.jsonl:byte 10, a.jsonl:byte 20")


def test_a_step_that_is_left_out_leaves_no_trace(trainer, monkeypatch):  # noqa: F811
    """The weights at the end are those of a run whose optimizer was not asked in that step."""
    expected = trainer()
    with monkeypatch.context() as patch:
        whole = torch.optim.AdamW.step

        def step(self, *args, **kwargs):
            return None if expected.state.global_step == 4 else whole(self, *args, **kwargs)

        patch.setattr(torch.optim.AdamW, "step", step)
        expected.train()
    spoilt = trainer()
    spoilt.bad_steps = watcher(2, [])
    forward = ContrastiveModel.forward

    def nan(self, batch):
        return forward(self, batch) * (NAN if spoilt.state.global_step == 4 else 1)

    monkeypatch.setattr(ContrastiveModel, "forward", nan)
    spoilt.train()
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(spoilt)[name], value, rtol=0, atol=0)
    losses = [entry["loss"] for entry in spoilt.state.log_history if "loss" in entry]
    assert torch.tensor(losses).isfinite().all()  # --logging_nan_inf_filter


def test_where_no_update_can_be_left_out_the_first_loss_that_is_not_finite_ends_the_run(trainer, monkeypatch):  # noqa: F811
    """As with DeepSpeed, whose backward pass makes the update: there is none."""
    bad = watcher(9, [])
    for loss in (1.0, 2.0):
        bad.step(torch.tensor(loss), BATCH)
        bad.check(7, lambda batch: None)
    for loss in (NAN, INF):
        bad.step(torch.tensor(loss), BATCH)
        with pytest.raises(UserError, match=rf"loss of step 8 is {loss};.*first: b.jsonl:byte 30, a.jsonl:byte 10"):
            bad.check(8, lambda batch: [True, True, False])
    run = trainer()
    run.bad_steps = watcher(9, [])
    forward = ContrastiveModel.forward

    def nan(self, batch):
        run.is_deepspeed_enabled = True  # from here on
        run.before = weights(run)
        return forward(self, batch) * NAN

    monkeypatch.setattr(ContrastiveModel, "forward", nan)
    with pytest.raises(UserError, match="loss of step 1 is nan"):
        run.train()
    assert all(torch.equal(value, run.before[name]) for name, value in weights(run).items())
