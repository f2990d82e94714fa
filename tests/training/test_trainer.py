"""The Trainer on a stream, in this process and without Ray: gradients, position, checkpoints, evaluation."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from streams import LocalStream, Scripted, Stop, StopAt, logged, stream_trainer, surveyed, weights
from tiny import make_tiny

from raybge.data.order import Order
from raybge.data.survey import Survey
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.losses.objective import Objective
from raybge.model.encoder import Encoder
from raybge.training.checkpoint import manifest as checkpoints
from raybge.training.checkpoint.manifest import Identity, newest
from raybge.training.tasks.finetuning import FineTuning
from raybge.training.trainer import StreamTrainer
from raybge.training.worker import _arguments, _trainer
from raybge.training.worker_config import WorkerConfig
from raybge.util.errors import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """With dropout: a resumed run has to restore the random state too."""
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", dropout=0.1)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Survey:
    return surveyed(tmp_path_factory.mktemp("data"))


@pytest.fixture
def trainer(tiny, found, tmp_path):
    """Makes a StreamTrainer; its flags are those of TrainingArguments."""

    def make(callbacks=(), validation=None, folder: Path = tmp_path, model=tiny, **more: Any) -> StreamTrainer:
        return stream_trainer(found, model, folder, callbacks, validation, **more)

    return make


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "lost_at", "resumed_at"),
    [
        ({"save_strategy": "steps", "save_steps": 4}, 6, 4),
        ({"save_strategy": "steps", "save_steps": 4}, 15, 12),  # in the second epoch
        ({"save_strategy": "epoch"}, 12, 9),  # where an epoch ends
        ({"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}, 8, 6),  # 5 updates an epoch
        ({"save_strategy": "steps", "save_steps": 7, "max_steps": 12, "lr_scheduler_type": "cosine"}, 8, 7),
    ],
)
def test_a_resumed_run_ends_as_an_undisturbed_one(trainer, tmp_path, flags, lost_at, resumed_at):
    """Weights, losses, learning rates and epochs; nothing is read before the position or twice."""
    whole = trainer(folder=tmp_path / "whole", **flags)
    whole.train()
    lost = trainer([StopAt(lost_at)], folder=tmp_path / "lost", **flags)
    with pytest.raises(Stop):
        lost.train()
    lost.finish_saving()
    start = newest(tmp_path / "lost")
    assert start.step == resumed_at
    resumed = trainer(folder=tmp_path / "lost", **flags)
    resumed.train(resume_from_checkpoint=start.path)

    assert resumed.stream.seen == whole.stream.seen[-len(resumed.stream.seen) :]
    assert resumed.stream.seen[0] == (start.epoch, start.position)
    names = ("loss", "learning_rate", "grad_norm", "epoch")
    np.testing.assert_allclose(logged(resumed, *names), logged(whole, *names), atol=1e-6)
    expected, before = weights(whole), weights(lost)
    for name, value in weights(resumed).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)
    assert any((before[name] - value).abs().max() > 1e-4 for name, value in expected.items())


def test_a_run_lost_after_its_last_checkpoint_trains_no_further(trainer, tmp_path):
    flags = {"save_strategy": "steps", "save_steps": 3, "max_steps": 12}  # in the middle of the second epoch
    whole = trainer(**flags)
    whole.train()
    resumed = trainer(**flags)
    resumed.train(resume_from_checkpoint=newest(tmp_path).path)
    assert resumed.state.global_step == 12 and not hasattr(resumed.stream, "seen")
    for name, value in weights(resumed).items():
        torch.testing.assert_close(value, weights(whole)[name], atol=0, rtol=0)


def test_a_resumed_run_saves_as_its_own_flags_say(trainer, tmp_path):
    trainer(save_strategy="steps", save_steps=4, max_steps=4).train()
    trainer(save_strategy="steps", save_steps=5, max_steps=11).train(resume_from_checkpoint=newest(tmp_path).path)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (4, 5, 10, 11)}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_a_resumed_run_goes_on_with_its_own_learning_rate(trainer, tmp_path, schedule):
    """The schedule goes on where it was; the rate is the one that is given now, for every parameter."""
    flags = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": schedule, "warmup_steps": 6}
    whole, doubled = trainer(**flags, weight_decay=0.1), trainer(**flags, weight_decay=0.1, learning_rate=2e-3)
    whole.train()
    doubled.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    rates = dict(logged(whole, "learning_rate"))
    assert dict(logged(doubled, "learning_rate")) == pytest.approx(
        {step: rate * (1 + (step > 8)) for step, rate in rates.items()}
    )
    assert {group["initial_lr"] for group in doubled.optimizer.param_groups} == {2e-3}


def test_a_half_written_checkpoint_is_not_continued_from(trainer, tmp_path, monkeypatch):
    """The machine is lost while the second checkpoint is written; the resumed run writes it anew."""
    flags = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9, "save_total_limit": 1}
    lost = trainer(**flags)

    def save(folder: str, *_: Any) -> None:
        Encoder.save(lost.encoder, folder)
        if folder.endswith("-8"):
            raise Stop

    monkeypatch.setattr(lost.encoder, "save", save)
    with pytest.raises(Stop):
        lost.train()
    assert not (tmp_path / "checkpoint-8").exists()
    assert list(tmp_path.glob(".raybge/writing-*/checkpoint-8/model.safetensors"))
    (tmp_path / "checkpoint-8").mkdir()  # as a store has it, of a run with more workers
    (tmp_path / "checkpoint-8" / "rng_state_7.pth").touch()
    assert newest(tmp_path).step == 4  # save_total_limit has not removed it
    left = []
    again = trainer(
        **flags, on_checkpoint=lambda path: left.append((Path(path).name, Path(path, "rng_state_7.pth").exists()))
    )
    again.train(resume_from_checkpoint=newest(tmp_path).path)
    assert left == [("checkpoint-8", False), ("checkpoint-9", False)]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]
    assert not list(tmp_path.glob(".raybge/writing-*/checkpoint-*"))


def test_what_a_checkpoint_holds(trainer, tmp_path):
    told = []
    trainer(save_strategy="steps", save_steps=7, max_steps=14, on_checkpoint=told.append).train()
    folder = tmp_path / "checkpoint-14"
    assert told == [str(tmp_path / "checkpoint-7"), str(folder)]
    record = json.loads((folder / checkpoints.RECORD).read_text())
    assert (record["step"], record["epoch"], record["position"], record["global_batch"]) == (14, 1, 5, 6)
    assert {"modules.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert not list(tmp_path.rglob("training_args.bin"))  # it holds the hub's token


def test_a_model_without_its_optimizer_is_no_place_to_continue(trainer, tmp_path):
    trainer(save_strategy="steps", save_steps=2, max_steps=6, save_only_model=True, save_total_limit=2).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert newest(tmp_path) is None


# --- the loss and its gradient --------------------------------------------------------------------------------------


class Gradients(transformers.TrainerCallback):
    """What the optimizer gets at each update."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.seen.append(gradient(model))


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_an_accumulated_gradient_is_the_mean_of_its_steps(trainer, tmp_path):
    """9 steps in fours: 4, 4 and, at the end of the epoch, 1. The reference knows nothing of the Trainer."""
    calm = make_tiny(tmp_path / "calm", dropout=0.0)
    gradients = Gradients()
    flags = {"gradient_accumulation_steps": 4, "learning_rate": 0.0, "num_train_epochs": 1, "max_grad_norm": 0}
    made = trainer([gradients], model=calm, **flags)
    made.train()
    model = ContrastiveModel(Encoder(calm, devices="cpu").model, Objective(0.1), None)
    batches = [item["batch"] for item in made.stream]
    assert len(gradients.seen) == 3
    for seen, part in zip(gradients.seen, (batches[:4], batches[4:8], batches[8:]), strict=True):
        model.zero_grad()
        losses = [model(batch) for batch in part]
        (sum(losses) / len(part)).backward()
        torch.testing.assert_close(seen, gradient(model), atol=1e-6, rtol=1e-5)
    last = made.state.log_history[2]
    assert last["step"] == 3 and last["loss"] == pytest.approx(losses[0].item(), abs=1e-4)


def test_tokens_are_counted(trainer):
    made = trainer(include_num_input_tokens_seen="all", num_train_epochs=1)
    made.train()
    expected = sum(len(ids) for item in made.stream for ids in item["batch"].token_ids)
    assert made.state.num_input_tokens_seen == expected > 0


def test_noise_on_the_embeddings_and_activation_checkpointing_reach_the_network(trainer):
    plain = trainer(max_steps=1)
    noisy = trainer(max_steps=1, neftune_noise_alpha=5.0)
    for each in (plain, noisy):
        each.train()
    assert abs(logged(plain, "loss")[0][1] - logged(noisy, "loss")[0][1]) > 1e-3
    saving = trainer(max_steps=1, activation_checkpointing=True)
    saving.train()
    assert saving.encoder.model.backbone.is_activation_checkpointing
    np.testing.assert_allclose(logged(saving, "loss"), logged(plain, "loss"), atol=1e-5)


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_the_best_model_by_metric_is_loaded_at_the_end(trainer, tmp_path):
    made = trainer(
        validation=Scripted([0.5, 0.6, 0.9, 0.7, 0.1]),
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        max_steps=8,
        load_best_model_at_end=True,
        metric_for_best_model="nDCG@10",
    )
    made.train()
    values = [(0, 0.5, 0.25), (2, 0.6, 0.3), (4, 0.9, 0.45), (6, 0.7, 0.35), (8, 0.1, 0.05)]
    assert logged(made, "eval_nDCG@10", "eval_MRR@10") == values
    best = tmp_path / "checkpoint-4"
    assert made.state.best_model_checkpoint == str(best) and made.state.best_metric == 0.9
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    for name, value in Encoder(str(best), devices="cpu").model.named_parameters():
        torch.testing.assert_close(value, dict(made.encoder.model.named_parameters())[name], atol=0, rtol=0)


def test_what_the_model_measures_before_training_may_be_known(trainer):
    flags = {"eval_strategy": "steps", "eval_steps": 9, "eval_on_start": True}
    known = {"nDCG@10": 0.25, "MRR@10": 0.5}
    watched = trainer(validation=Scripted([0.3, 0.4]), before=known, **flags)
    watched.train()
    expected = [(0, 0.25, 0.5), (9, 0.3, 0.15), (18, 0.4, 0.2)]
    assert logged(watched, "eval_nDCG@10", "eval_MRR@10") == expected


def test_a_schedule_can_follow_the_metric(trainer):
    """reduce_lr_on_plateau: no better for longer than its patience of 0 halves the rate."""
    made = trainer(
        validation=Scripted([0.5, 0.4, 0.3]),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=3,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"mode": "max", "patience": 0, "factor": 0.5},
        metric_for_best_model="MRR@10",
    )
    made.train()
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-4)


# --- the worker's model


def test_the_network_is_compiled_and_the_loss_stays(tiny, found, tmp_path):
    """What lies around it, ragged lists and collectives, is left to Python."""
    order = Order(found.rows, 6, seed=1)

    def made(**flags: Any) -> StreamTrainer:
        config = WorkerConfig(
            learning=FineTuning(
                encoder={"model_name_or_path": tiny},
                lengths=dict(query_max_len=8, passage_max_len=999),
                draws=dict(group_size=3, seed=1),
                objective=Objective(0.1),
                fix_position_embedding=True,
            ),
            training=dict(output_dir=str(tmp_path), use_cpu=True, **flags),
            survey=found,
            order=order,
            output_dir=str(tmp_path),
            markers=(),
            cpus=1,
            reading_cpus=1.0,
            logging_dir=None,
            board=None,
            identity=Identity.of(found, order, 1),
        )
        return _trainer(config, _arguments(config), 0, 1)

    plain, compiled = made(), made(torch_compile=True, torch_compile_backend="eager")
    assert compiled.encoder.model.backbone._compiled_call_impl is not None
    assert not compiled.args.torch_compile  # the Trainer would compile the rest too
    stream = plain.stream
    local = LocalStream(stream.survey, stream.order, stream.tokenizer, 0, 1, 1.0)
    batch = next(iter(local))["batch"]
    torch.testing.assert_close(compiled.model.eval()(batch), plain.model.eval()(batch))


def test_flags_that_only_transformers_knows_to_be_wrong_are_a_persons_mistake(found):
    config = SimpleNamespace(training={"output_dir": "o", "optim": "nonsense"}, validation=None, resume_from=None)
    with pytest.raises(UserError, match="nonsense"):
        _arguments(config)
