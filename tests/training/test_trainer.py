"""The Trainer on a stream, in the test's process and without Ray: gradients, position, checkpoints, evaluation."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from process_runtime import ProcessWorkerContext
from tiny import make_tiny
from trainers import FailAt, LocalStream, RunLost, ScriptedValidation, logged, weights

from raybge.cli.options import TrainOptions
from raybge.cli.parser import build_options
from raybge.data.order import Order
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.losses.objective import Objective
from raybge.model.encoder import Encoder
from raybge.training.checkpoint.manifest import MANIFEST, RunIdentity, latest_checkpoint
from raybge.training.tasks.finetune_spec import FinetuneSpec
from raybge.training.tasks.finetune_task import FinetuneTask
from raybge.training.trainer import StreamTrainer
from raybge.training.worker import build_arguments, build_trainer
from raybge.training.worker_config import WorkerConfig
from raybge.util.errors import UserError

# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "lost_at", "resumed_at"),
    [
        ({"save_strategy": "steps", "save_steps": 4}, 6, 4),
        ({"save_strategy": "steps", "save_steps": 4}, 15, 12),  # in the second epoch
        ({"save_strategy": "epoch"}, 12, 9),  # at the end of an epoch
        ({"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}, 8, 6),  # 5 updates an epoch
        ({"save_strategy": "steps", "save_steps": 7, "max_steps": 12, "lr_scheduler_type": "cosine"}, 8, 7),
    ],
)
def test_resumed_run_equals_uninterrupted_run(make_trainer, tmp_path, flags, lost_at, resumed_at):
    """Weights, losses, learning rates and epochs are equal; nothing is read before the position or twice."""
    whole = make_trainer(folder=tmp_path / "whole", **flags)
    whole.train()
    lost = make_trainer([FailAt(lost_at)], folder=tmp_path / "lost", **flags)
    with pytest.raises(RunLost):
        lost.train()
    lost.writer.wait()
    start = latest_checkpoint(tmp_path / "lost")
    assert start.step == resumed_at
    resumed = make_trainer(folder=tmp_path / "lost", **flags)
    resumed.train(resume_from_checkpoint=start.path)

    steps_read = resumed.stream.steps_read
    assert steps_read == whole.stream.steps_read[-len(steps_read) :]
    assert steps_read[0] == (start.epoch, start.position)
    names = ("loss", "learning_rate", "grad_norm", "epoch")
    np.testing.assert_allclose(logged(resumed, *names), logged(whole, *names), atol=1e-6)
    expected, before = weights(whole), weights(lost)
    for name, value in weights(resumed).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)
    assert any((before[name] - value).abs().max() > 1e-4 for name, value in expected.items())


def test_run_lost_after_last_checkpoint_trains_no_further(make_trainer, tmp_path):
    flags = {"save_strategy": "steps", "save_steps": 3, "max_steps": 12}  # in the middle of the second epoch
    whole = make_trainer(**flags)
    whole.train()
    resumed = make_trainer(**flags)
    resumed.train(resume_from_checkpoint=latest_checkpoint(tmp_path).path)
    assert resumed.state.global_step == 12 and not hasattr(resumed.stream, "steps_read")
    for name, value in weights(resumed).items():
        torch.testing.assert_close(value, weights(whole)[name], atol=0, rtol=0)


def test_resumed_run_saves_by_its_own_flags(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=4, max_steps=4).train()
    resumed = make_trainer(save_strategy="steps", save_steps=5, max_steps=11)
    resumed.train(resume_from_checkpoint=latest_checkpoint(tmp_path).path)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (4, 5, 10, 11)}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_resumed_run_uses_its_own_learning_rate(make_trainer, tmp_path, schedule):
    """The schedule continues from its position, with the new base rate for every parameter."""
    flags = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": schedule, "warmup_steps": 6}
    whole = make_trainer(**flags, weight_decay=0.1)
    doubled = make_trainer(**flags, weight_decay=0.1, learning_rate=2e-3)
    whole.train()
    doubled.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    rates = dict(logged(whole, "learning_rate"))
    assert dict(logged(doubled, "learning_rate")) == pytest.approx(
        {step: rate * (1 + (step > 8)) for step, rate in rates.items()}
    )
    assert {group["initial_lr"] for group in doubled.optimizer.param_groups} == {2e-3}


def test_incomplete_checkpoint_is_not_resumed_from(make_trainer, tmp_path, monkeypatch):
    """The process is lost while the second checkpoint is written; the resumed run writes it again."""
    flags = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9, "save_total_limit": 1}
    lost = make_trainer(**flags)

    def save(folder: str, *_: Any) -> None:
        Encoder.save(lost.encoder, folder)
        if folder.endswith("-8"):
            raise RunLost

    monkeypatch.setattr(lost.encoder, "save", save)
    with pytest.raises(RunLost):
        lost.train()
    assert not (tmp_path / "checkpoint-8").exists()
    assert list(tmp_path.glob(".raybge/writing-*/checkpoint-8/model.safetensors"))
    (tmp_path / "checkpoint-8").mkdir()  # the incomplete checkpoint of an object store, from a run with more workers
    (tmp_path / "checkpoint-8" / "rng_state_7.pth").touch()
    assert latest_checkpoint(tmp_path).step == 4  # save_total_limit has not deleted it
    reported = []
    resumed = make_trainer(
        **flags, on_checkpoint=lambda path: reported.append((Path(path).name, Path(path, "rng_state_7.pth").exists()))
    )
    resumed.train(resume_from_checkpoint=latest_checkpoint(tmp_path).path)
    assert reported == [("checkpoint-8", False), ("checkpoint-9", False)]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]
    assert not list(tmp_path.glob(".raybge/writing-*/checkpoint-*"))


def test_content_of_a_checkpoint(make_trainer, tmp_path):
    reported = []
    make_trainer(save_strategy="steps", save_steps=7, max_steps=14, on_checkpoint=reported.append).train()
    folder = tmp_path / "checkpoint-14"
    assert reported == [str(tmp_path / "checkpoint-7"), str(folder)]
    record = json.loads((folder / MANIFEST).read_text())
    assert (record["step"], record["epoch"], record["position"], record["global_batch"]) == (14, 1, 5, 6)
    assert {"modules.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert not list(tmp_path.rglob("training_args.bin"))  # it would contain the hub's token


def test_checkpoint_without_optimizer_cannot_be_resumed_from(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=2, max_steps=6, save_only_model=True, save_total_limit=2).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert latest_checkpoint(tmp_path) is None


# --- the loss and its gradient --------------------------------------------------------------------------------------


class GradientRecorder(transformers.TrainerCallback):
    """Records the gradient that the optimizer receives at each update."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.gradients.append(gradient(model))


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_accumulated_gradient_is_the_mean_of_its_steps(make_trainer, tmp_path):
    """9 steps in fours: 4, 4 and, at the end of the epoch, 1. The reference does not use the Trainer."""
    model_folder = make_tiny(tmp_path / "no-dropout", dropout=0.0)
    recorder = GradientRecorder()
    flags = {"gradient_accumulation_steps": 4, "learning_rate": 0.0, "num_train_epochs": 1, "max_grad_norm": 0}
    trainer = make_trainer([recorder], model=model_folder, **flags)
    trainer.train()
    model = ContrastiveModel(Encoder(model_folder, devices="cpu").model, Objective(0.1), None)
    batches = [item["batch"] for item in trainer.stream]
    assert len(recorder.gradients) == 3
    for actual, part in zip(recorder.gradients, (batches[:4], batches[4:8], batches[8:]), strict=True):
        model.zero_grad()
        losses = [model(batch) for batch in part]
        (sum(losses) / len(part)).backward()
        torch.testing.assert_close(actual, gradient(model), atol=1e-6, rtol=1e-5)
    last = trainer.state.log_history[2]
    assert last["step"] == 3 and last["loss"] == pytest.approx(losses[0].item(), abs=1e-4)


def test_input_tokens_are_counted(make_trainer):
    trainer = make_trainer(include_num_input_tokens_seen="all", num_train_epochs=1)
    trainer.train()
    expected = sum(len(ids) for item in trainer.stream for ids in item["batch"].token_ids)
    assert trainer.state.num_input_tokens_seen == expected > 0


def test_neftune_noise_and_activation_checkpointing_reach_the_backbone(make_trainer):
    plain = make_trainer(max_steps=1)
    noisy = make_trainer(max_steps=1, neftune_noise_alpha=5.0)
    for trainer in (plain, noisy):
        trainer.train()
    assert abs(logged(plain, "loss")[0][1] - logged(noisy, "loss")[0][1]) > 1e-3
    checkpointing = make_trainer(max_steps=1, activation_checkpointing=True)
    checkpointing.train()
    assert checkpointing.encoder.model.backbone.is_activation_checkpointing
    np.testing.assert_allclose(logged(checkpointing, "loss"), logged(plain, "loss"), atol=1e-5)


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_best_model_by_metric_is_loaded_at_the_end(make_trainer, tmp_path):
    trainer = make_trainer(
        validation=ScriptedValidation([0.5, 0.6, 0.9, 0.7, 0.1]),
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
    trainer.train()
    values = [(0, 0.5, 0.25), (2, 0.6, 0.3), (4, 0.9, 0.45), (6, 0.7, 0.35), (8, 0.1, 0.05)]
    assert logged(trainer, "eval_nDCG@10", "eval_MRR@10") == values
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best) and trainer.state.best_metric == 0.9
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    for name, value in Encoder(str(best), devices="cpu").model.named_parameters():
        torch.testing.assert_close(value, dict(trainer.encoder.model.named_parameters())[name], atol=0, rtol=0)


def test_known_initial_metrics_replace_the_first_evaluation(make_trainer):
    flags = {"eval_strategy": "steps", "eval_steps": 9, "eval_on_start": True}
    initial = {"nDCG@10": 0.25, "MRR@10": 0.5}
    trainer = make_trainer(validation=ScriptedValidation([0.3, 0.4]), initial_metrics=initial, **flags)
    trainer.train()
    expected = [(0, 0.25, 0.5), (9, 0.3, 0.15), (18, 0.4, 0.2)]
    assert logged(trainer, "eval_nDCG@10", "eval_MRR@10") == expected


def test_schedule_can_follow_the_metric(make_trainer):
    """reduce_lr_on_plateau halves the rate after an evaluation that is not better, with a patience of 0."""
    trainer = make_trainer(
        validation=ScriptedValidation([0.5, 0.4, 0.3]),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=3,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"mode": "max", "patience": 0, "factor": 0.5},
        metric_for_best_model="MRR@10",
    )
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-4)


# --- the worker's trainer -------------------------------------------------------------------------------------------


def test_only_the_backbone_is_compiled_and_the_loss_is_equal(dropout_model, survey, tmp_path):
    """The code around it, ragged lists and collectives, stays in Python."""
    order = Order(survey.rows, 6, seed=1)
    flags = {"query_max_len": 8, "passage_max_len": 999, "train_group_size": 3, "temperature": 0.1}
    paths = {"model_name_or_path": dropout_model, "train_data": survey.files[0].path, "output_dir": str(tmp_path)}
    options = build_options(TrainOptions, {**paths, **flags, "fix_position_embedding": True})

    def build(**flags: Any) -> StreamTrainer:
        config = WorkerConfig(
            task=FinetuneTask(FinetuneSpec.from_options(options)),
            training=dict(output_dir=str(tmp_path), use_cpu=True, **flags),
            survey=survey,
            order=order,
            output_dir=str(tmp_path),
            markers=(),
            cpus=1,
            reading_cpus=1.0,
            logging_dir=None,
            run_state=None,
            identity=RunIdentity.of(survey, order, 1),
        )
        return build_trainer(config, build_arguments(config), ProcessWorkerContext(0, 1, "attempt"))

    plain, compiled = build(), build(torch_compile=True, torch_compile_backend="eager")
    assert compiled.encoder.model.backbone._compiled_call_impl is not None
    assert not compiled.args.torch_compile  # the Trainer would compile the rest too
    stream = plain.stream
    local = LocalStream(stream.survey, stream.order, stream.tokenizer, 0, 1, 1.0)
    batch = next(iter(local))["batch"]
    torch.testing.assert_close(compiled.model.eval()(batch), plain.model.eval()(batch))


def test_flags_that_transformers_refuses_are_a_user_error():
    config = SimpleNamespace(training={"output_dir": "o", "optim": "nonsense"}, validation=None, resume_from=None)
    with pytest.raises(UserError, match="nonsense"):
        build_arguments(config)
