"""Contract of HookedTrainer: transformers calls the private methods that it overrides as it expects."""

import ast
from pathlib import Path

import pytest
import torch
import transformers

import raybge
from raybge.compat.hooked_trainer import PRIVATE_METHODS, HookedTrainer
from raybge.compat.library_versions import UnsupportedVersionError
from raybge.training.trainer import StreamTrainer

ADVICE = "transformers' Trainer has changed: adapt raybge/compat/hooked_trainer.py"


def test_the_trainer_of_a_run_uses_no_private_name_of_transformers():
    """Private names of the Trainer reach a subclass through `self`: they are looked up in the class itself."""
    private = {name for name in vars(transformers.Trainer) if name.startswith("_") and not name.startswith("__")}
    for path in sorted(Path(raybge.__file__).parent.glob("training/**/*.py")):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & private, path.name
    assert not private & {*vars(StreamTrainer)}
    assert private & {*vars(HookedTrainer)} == {*PRIVATE_METHODS}
    assert len(PRIVATE_METHODS) <= 6


class RecordedTrainer(HookedTrainer):
    """Trains a linear layer on 4 batches an epoch, and records what the hooks get."""

    def __init__(self, folder: Path, **flags: object) -> None:
        arguments = transformers.TrainingArguments(
            str(folder),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            num_train_epochs=2,
            ignore_data_skip=True,
            remove_unused_columns=False,
            **flags,
        )
        super().__init__(torch.nn.Linear(2, 1), arguments)
        self.events: list[tuple] = []

    def get_train_dataloader(self) -> list[dict]:
        return [{"x": torch.ones(1, 2)}] * 4

    def compute_loss(self, model, inputs, *_, **__):
        self.events.append(("loss", self.state.global_step))
        return model(inputs["x"]).sum()

    def restore_state(self, max_steps):
        self.events.append(("restore", max_steps, self.state.global_step))

    def updates_done(self, epoch, updates):
        self.events.append(("epoch", epoch, updates))
        return self.state.global_step - epoch * updates

    def check_gradients(self, model, norm):
        self.events.append(("norm", float(norm)))
        return norm

    def save_checkpoint(self):
        self.events.append(("save", self.state.global_step))


def kinds(trainer: RecordedTrainer, kind: str) -> list[tuple]:
    return [event[1:] for event in trainer.events if event[0] == kind]


def test_the_trainer_calls_the_hooks(tmp_path):
    trainer = RecordedTrainer(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    assert kinds(trainer, "restore") == [(8, 0)], ADVICE
    assert kinds(trainer, "epoch") == [(0, 4), (1, 4)], ADVICE
    assert kinds(trainer, "loss") == [(step,) for step in range(8)], ADVICE
    assert kinds(trainer, "norm") == [(pytest.approx(3**0.5),)] * 8, ADVICE  # of the gradient (1, 1, 1)
    assert kinds(trainer, "save") == [(3,), (6,), (8,)], ADVICE
    assert not [*tmp_path.glob("checkpoint-*")], ADVICE


def test_an_update_has_the_gradients_of_its_steps(tmp_path):
    """Four batches an epoch in threes: the last update of an epoch has one."""
    trainer = RecordedTrainer(tmp_path, gradient_accumulation_steps=3, save_strategy="no", learning_rate=0.0)
    trainer.train()
    assert kinds(trainer, "restore") == [(4, 0)], ADVICE
    assert kinds(trainer, "epoch") == [(0, 2), (1, 2)], ADVICE
    assert kinds(trainer, "loss") == [(update,) for update in (0, 0, 0, 1, 2, 2, 2, 3)], ADVICE
    assert kinds(trainer, "norm") == [(pytest.approx(3**0.5),)] * 4, ADVICE  # mean of equal gradients


def test_the_trainer_continues_within_an_epoch(tmp_path):
    transformers.TrainerState(global_step=6, max_steps=8, train_batch_size=8).save_to_json(
        str(tmp_path / "trainer_state.json")
    )
    trainer = RecordedTrainer(tmp_path)
    trainer.resume_folder = str(tmp_path)
    trainer.train()
    assert kinds(trainer, "restore") == [(8, 6)], ADVICE
    assert kinds(trainer, "epoch") == [(1, 4)], ADVICE
    assert kinds(trainer, "loss") == [(6,), (7,)], ADVICE


def test_the_mean_of_the_losses_since_the_last_log_is_known(tmp_path):
    means, losses = [], []

    class Trainer(RecordedTrainer):
        def training_step(self, *args):
            loss = super().training_step(*args)
            means.append(float(self.mean_logged_loss))
            losses.append(float(loss))
            return loss

    Trainer(tmp_path, logging_steps=3).train()
    expected = [sum(losses[3 * (i // 3) : i]) / (1 + i % 3) for i in range(8)]
    assert means == pytest.approx(expected, abs=1e-5), ADVICE


@pytest.mark.parametrize("name", PRIVATE_METHODS)
def test_a_trainer_without_a_private_method_is_named(monkeypatch, tmp_path, name):
    monkeypatch.delattr(transformers.Trainer, name)
    with pytest.raises(UnsupportedVersionError, match=f"has no Trainer.{name}"):
        RecordedTrainer(tmp_path)
