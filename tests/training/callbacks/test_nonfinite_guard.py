"""Decisions and messages of the non-finite guard, in the test's process; across workers in test_divergence.py."""

from types import SimpleNamespace

import pytest
import torch
from trainers import weights

from raybge.losses.contrastive_model import ContrastiveModel
from raybge.training.callbacks.nonfinite_guard import NonFiniteGuard
from raybge.util.errors import UserError

NAN, INF = float("nan"), float("inf")
BATCH = SimpleNamespace(rows=[(0, 10), (0, 20), (1, 30)])


def make_guard(limit: int, lines: list[str]) -> NonFiniteGuard:
    return NonFiniteGuard(limit, ["a.jsonl", "b.jsonl"], lines.append)


def skips(guard: NonFiniteGuard, loss: float, norm: float, scaled: bool = False, finite=lambda batch: None) -> bool:
    """Pass one step through the guard; return whether its update is skipped."""
    guard.add_step(torch.tensor(loss), BATCH)
    return guard.should_skip(torch.tensor(norm), 7, finite, scaled)


@pytest.mark.parametrize(("loss", "norm"), [(1.0, INF), (1.0, NAN), (NAN, NAN)])
def test_only_consecutive_nonfinite_updates_end_a_run(loss, norm):
    lines: list[str] = []
    guard = make_guard(2, lines)
    assert skips(guard, loss, norm)
    assert not skips(guard, 1.0, 3.0)
    assert skips(guard, loss, norm)
    assert len(lines) == 2
    with pytest.raises(UserError, match="2 steps in a row"):
        skips(guard, loss, norm)


def test_nonfinite_loss_makes_the_gradient_nonfinite():
    """Although its own gradient is finite: other workers see only the sum of the gradients."""
    x = torch.tensor(2.0, requires_grad=True)
    make_guard(1, []).add_step(x + INF, BATCH).backward()
    assert x.grad.isnan()


def test_gradient_of_a_finite_loss_is_unchanged():
    x = torch.tensor(2.0, requires_grad=True)
    make_guard(1, []).add_step(x**3, BATCH).backward()
    assert x.grad == 12


def test_overflow_of_a_scaled_gradient_is_not_an_error():
    """In half precision gradients overflow until the scale fits; a loss that is not finite still is an error."""
    guard = make_guard(1, [])
    assert not skips(guard, 1.0, INF, scaled=True)
    with pytest.raises(UserError):
        skips(guard, NAN, INF, scaled=True)


def test_nonfinite_rows_are_named_first():
    lines: list[str] = []
    skips(make_guard(2, lines), NAN, NAN, finite=lambda batch: [True, True, False])
    assert lines[0].endswith("b.jsonl:byte 30, a.jsonl:byte 10, a.jsonl:byte 20")


@pytest.mark.parametrize("behind_host", [False, True], ids=["host decides", "device decides"])
def test_skipped_update_has_no_effect(make_trainer, monkeypatch, behind_host):
    """The final weights equal those of a run whose optimizer does not step in that update."""
    monkeypatch.setattr("raybge.training.callbacks.nonfinite_guard.runs_behind_host", lambda device: behind_host)
    expected = make_trainer()
    with monkeypatch.context() as patch:
        adamw_step = torch.optim.AdamW.step

        def step(self, *args, **kwargs):
            return None if expected.state.global_step == 4 else adamw_step(self, *args, **kwargs)

        patch.setattr(torch.optim.AdamW, "step", step)
        expected.train()
    trainer = make_trainer()
    lines: list[str] = []
    trainer.nonfinite_guard = make_guard(2, lines)
    forward = ContrastiveModel.forward

    def nan_forward(self, batch):
        return forward(self, batch) * (NAN if trainer.state.global_step == 4 else 1)

    monkeypatch.setattr(ContrastiveModel, "forward", nan_forward)
    trainer.train()
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(trainer)[name], value, rtol=0, atol=0)
    assert len(lines) == 1 and lines[0].startswith("step 5 is skipped (loss nan)")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert torch.tensor(losses).isfinite().all()  # --logging_nan_inf_filter


def test_a_postponed_update_is_judged_as_if_it_had_been_read_at_once():
    """The right update is named, whichever follows; one that is finite ends a row of others."""
    lines: list[str] = []
    guard = make_guard(2, lines)
    for update, norm in enumerate((INF, 3.0, NAN), start=1):
        guard.resolve(lambda batch: None)
        guard.add_step(torch.tensor(1.0), BATCH)
        guard.postpone(torch.tensor(norm), update)
    guard.resolve(lambda batch: None)
    guard.resolve(lambda batch: None)  # nothing is left
    assert [line.split(" is skipped")[0] for line in lines] == ["step 1", "step 3"]
    guard.add_step(torch.tensor(1.0), BATCH)
    guard.postpone(torch.tensor(INF), 4)
    with pytest.raises(UserError, match=r"2 steps in a row .* the last of them step 4 \(loss 1.0000, gradient inf\)"):
        guard.resolve(lambda batch: None)


@pytest.mark.parametrize("steps", [3, 4], ids=["at the next update", "at the end"])
def test_a_postponed_update_ends_the_run(make_trainer, monkeypatch, steps):
    """Update 3 is the second in a row: it is found at update 4, or at the end, before anything is saved."""
    monkeypatch.setattr("raybge.training.callbacks.nonfinite_guard.runs_behind_host", lambda device: True)
    trainer = make_trainer(max_steps=steps, save_strategy="no")
    trainer.nonfinite_guard = make_guard(2, [])
    forward = ContrastiveModel.forward

    def nan_forward(self, batch):
        return forward(self, batch) * (NAN if trainer.state.global_step in (1, 2) else 1)

    monkeypatch.setattr(ContrastiveModel, "forward", nan_forward)
    with pytest.raises(UserError, match="the last of them step 3"):
        trainer.train()
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_first_nonfinite_loss_ends_a_deepspeed_run(make_trainer, monkeypatch):
    """DeepSpeed's backward pass includes the update, which therefore cannot be skipped: there must be none."""
    guard = make_guard(9, [])
    for loss in (1.0, 2.0):
        guard.add_step(torch.tensor(loss), BATCH)
        guard.check_loss(7, lambda batch: None)
    for loss in (NAN, INF):
        guard.add_step(torch.tensor(loss), BATCH)
        with pytest.raises(UserError, match=rf"loss of step 8 is {loss};.*first: b.jsonl:byte 30, a.jsonl:byte 10"):
            guard.check_loss(8, lambda batch: [True, True, False])
    trainer = make_trainer()
    trainer.nonfinite_guard = make_guard(9, [])
    forward = ContrastiveModel.forward
    initial = {}

    def nan_forward(self, batch):
        trainer.is_deepspeed_enabled = True  # from the first forward pass on
        initial.update(weights(trainer))
        return forward(self, batch) * NAN

    monkeypatch.setattr(ContrastiveModel, "forward", nan_forward)
    with pytest.raises(UserError, match="loss of step 1 is nan"):
        trainer.train()
    assert all(torch.equal(value, initial[name]) for name, value in weights(trainer).items())
