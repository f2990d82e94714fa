"""transformers' Trainer on a worker's own stream: position in the data, loss, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from raybge.compat.torch import set_logged_rates
from raybge.data.stream import StepStream
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.training.callbacks.nonfinite_guard import NonFiniteGuard
from raybge.training.checkpoint.manifest import (
    RunIdentity,
    checkpoint_name,
    checkpoint_path,
    commit_checkpoint,
    delete_checkpoint,
    is_complete,
    list_checkpoints,
)
from raybge.training.checkpoint.safe_load import safe_loading
from raybge.training.checkpoint.writer import CheckpointWriter, PublishRequest, StagingFolder
from raybge.training.row_records import RowWriter
from raybge.training.score_sampling import ScoreSampler
from raybge.training.sharding import unsharded
from raybge.training.step_metrics import StepRecorder
from raybge.training.tasks.task import TaskComponents
from raybge.util.activity import READING, STARTING, activity, collective, current_activity, set_activity
from raybge.util.redaction import redact

if TYPE_CHECKING:
    from raybge.evaluation.in_training import RetrievalValidator
    from raybge.evaluation.query_examples import QueryExample, RetrievalResult

PUBLISH_WAIT_SECONDS = 1.0  # between two collectives that ask whether a checkpoint is published


@dataclass(frozen=True)
class TrainerContext:
    """Objects of a run that a StreamTrainer works with.

    Args:
        identity: identity of the run, written into each checkpoint.
        validation: evaluates the encoder; None without --eval_data.
        on_checkpoint: called on every worker with the path of each checkpoint, once it is complete and all workers are
            at the same point of training.
        initial_metrics: metrics of the model before its first step, if they are known.
        row_writer: records the rows of each step.
        nonfinite_guard: skips updates that are not finite.
        storage: folder or URI of the checkpoints; None: the output folder of the TrainingArguments.
        attempt: name of this attempt, unique among those of the run; None: a random name.
    """

    identity: RunIdentity
    validation: RetrievalValidator | None = None
    on_checkpoint: Callable[[str], None] | None = None
    initial_metrics: Mapping[str, float] | None = None
    row_writer: RowWriter | None = None
    nonfinite_guard: NonFiniteGuard | None = None
    storage: str | None = None
    attempt: str | None = None


class StreamTrainer(transformers.Trainer):
    """transformers' Trainer on a stream that already is this worker's share of the data.

    Args:
        stream: stream of this worker; the Trainer's epochs are those of the stream.
        components: the model that is trained, with its tokenizer and encoder.
        context: objects of the run.
        **kwargs: arguments of transformers.Trainer.
    """

    control: Any  # of the Trainer
    loss_is_scaled_for_ga = False  # the loss of a step is a mean: the Trainer divides it by the steps of an update

    def __init__(self, stream: StepStream, components: TaskComponents, context: TrainerContext, **kwargs: Any):
        # The Trainer requires a data set if it is to evaluate; the real one belongs to `validation`.
        super().__init__(eval_dataset=range(0) if context.validation else None, model=components.model, **kwargs)
        self.stream = stream
        self.components = components
        self.encoder = components.encoder
        self.context = context
        self.validation = context.validation
        self.nonfinite_guard = context.nonfinite_guard
        # The Trainer's own filter waits for the device twice a step.
        self.filters_losses, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        self.step_metrics = StepRecorder()
        self.score_sampler = ScoreSampler(components.model)
        self.first_result: RetrievalResult | None = None  # of each query before the first step
        self.storage = context.storage or str(self.args.output_dir)
        self.staging = StagingFolder(self.storage, context.attempt or uuid.uuid4().hex)
        local_rank = self.args.local_process_index
        self.writer = CheckpointWriter(self.storage, self.staging, self.args.process_index, local_rank)
        self._saved_step: int | None = None  # update of the last checkpoint that was written
        self._reported_step: int | None = None  # update of the last one passed to `on_checkpoint`

    # --- position in the stream ---

    def get_train_dataloader(self) -> StepStream:
        """Return the stream: accelerate would otherwise dispatch the batches of rank 0 to all workers."""
        return self.stream

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """Log, evaluate and save in a resumed run according to its own flags, not to those in the checkpoint."""
        start = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        best = self.state.best_global_step
        if best and not self.state.best_model_checkpoint:  # the Trainer searches for it in folders only
            path = checkpoint_path(self.storage, best)
            self.state.best_model_checkpoint = redact(path) if is_complete(path) else None
        return start

    def _run_epoch(self, **epoch_arguments: Any) -> None:
        """Run the Trainer's epoch from the position of the checkpoint, without reading anything before it.

        The Trainer would have accelerate skip batches of a DataLoader. Instead it gets an epoch of the remaining
        length, from a stream that starts at the position; for an epoch from its beginning, no step has been done.
        """
        if self.state.global_step >= self.state.max_steps:  # a run that was lost after its last checkpoint
            self.control.should_training_stop = True
            return
        done = self.state.global_step - epoch_arguments["epoch"] * epoch_arguments["num_update_steps_per_epoch"]
        self.stream.start_step = done * self.args.gradient_accumulation_steps
        epoch_arguments["num_update_steps_per_epoch"] -= done
        epoch_arguments["steps_in_epoch"] -= self.stream.start_step
        super()._run_epoch(**epoch_arguments)

    def get_batch_samples(self, *args: Any) -> Any:
        """Mark the time spent waiting for data, except at the start, when reading may be slow."""
        if current_activity().name == STARTING:
            return super().get_batch_samples(*args)
        with activity(READING):
            return super().get_batch_samples(*args)

    def position(self) -> tuple[int, int]:
        """Return (epoch, steps of that epoch's stream that are done)."""
        updates = -(-len(self.stream) // self.args.gradient_accumulation_steps)
        epoch, done = divmod(self.state.global_step, updates)
        return epoch, done * self.args.gradient_accumulation_steps

    # --- loss ---

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss to log: with --logging_nan_inf_filter, a loss that is not finite becomes the mean so far."""
        loss = super().training_step(*args, **kwargs)
        if not self.filters_losses:
            return loss
        mean: Any = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(loss.isfinite(), loss, mean)

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Run the forward pass and record its measurements. Return the scalar loss of this worker's share."""
        batch, step = inputs["batch"], self.state.global_step + 1
        if self.context.row_writer:
            self.context.row_writer.write(self.stream.epoch, batch.step, step, batch.rows)
        set_activity(f"the forward pass of step {step:,}", has_collective=True)
        sampling = self.score_sampler.sampling(self.state.global_step, self.state.max_steps)
        with contextlib.nullcontext() if self.stream.rank else sampling:
            loss = model(**inputs)
        if self.stream.rank == 0:  # the only one that reports
            # Undo the scaling for the mean over workers (see Objective).
            total = loss.detach() * self.stream.order.size(self.stream.epoch, batch.step) / self.stream.world
            self.step_metrics.add_step(total, batch)
        set_activity(f"the backward pass of step {step:,}", has_collective=True)
        if self.nonfinite_guard:
            loss = self.nonfinite_guard.add_step(loss, batch)
            if self.is_deepspeed_enabled:
                self.nonfinite_guard.check_loss(step, self._finite_rows)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient's norm; if it is not finite, delete the gradients, so that the update has no effect.

        The Trainer calls this before each update.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        # DeepSpeed's backward pass has applied the update already.
        if self.nonfinite_guard and not self.is_deepspeed_enabled:
            scaled = self.accelerator.scaler is not None
            skips = self.nonfinite_guard.should_skip(norm, self.state.global_step + 1, self._finite_rows, scaled)
            if skips and not scaled:
                model.zero_grad(set_to_none=True)  # optimizers ignore parameters without gradient, momentum included
        return norm

    def _finite_rows(self, batch: Any) -> list[bool] | None:
        """Return for each group whether its embeddings are finite; None if the model is not contrastive."""
        if not isinstance(self.components.model, ContrastiveModel):
            return None
        with unsharded(self.model), self.compute_loss_context_manager():
            return self.components.model.finite_groups(batch)

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        """Count the tokens of the texts themselves: batches are not padded here."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        own = torch.tensor(sum(map(len, inputs["batch"].token_ids)), device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(own).sum().item())

    # --- evaluation ---

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluate the model on all workers together; the metrics are logged as `eval_NAME`."""
        assert self.validation is not None
        start = time.monotonic()
        values = None if self.state.global_step else self.context.initial_metrics
        if values is None:
            with self.step_metrics.paused(), activity("an evaluation"), unsharded(self.model):
                values = self.validation.measure(self.encoder, self.state.global_step)
            if not self.state.global_step:
                self.first_result = self.validation.last_result
        metrics = {f"eval_{name}": value for name, value in values.items()}
        metrics["eval_runtime"] = round(time.monotonic() - start, 4)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def query_examples(self) -> list[QueryExample]:
        """Return the queries that the report shows, on worker 0. Collective.

        There are none unless this run has evaluated the model both before its first step and at its end.
        """
        if self.validation is None or self.first_result is None or self.validation.last_result is None:
            return []
        return self.validation.examples(self.first_result, self.validation.last_result)

    # --- saving ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.step_metrics.paused(), activity("saving a checkpoint"):
            self.wait_for_checkpoint()
            if self._saved_step != self.state.global_step:
                self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Have every worker write the Trainer's checkpoint on its node, and start to publish it in the background."""
        step = self.state.global_step
        self.writer.prepare(step)
        with collective("saving a checkpoint"):
            self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        if step == self.state.best_global_step:
            self.state.best_model_checkpoint = redact(checkpoint_path(self.storage, step))
        if self.args.should_save:  # again: the Trainer stored the staging folder as the path of the best checkpoint
            state_file = f"{self._get_output_dir(trial)}/checkpoint-{step}/trainer_state.json"
            self._write(lambda: self.state.save_to_json(state_file))
        publishers = self._gather_flags(self.writer.is_publisher)  # after this, every worker has written its part
        self._saved_step = step
        if not self.writer.is_publisher:
            return
        # Without the optimizer it is a model to use, and not a checkpoint to resume from.
        epoch, position = self.position()
        identity = self.context.identity
        commit = partial(commit_checkpoint, step=step, epoch=epoch, position=position, identity=identity)
        part, parts = sum(publishers[: self.args.process_index]), sum(publishers)
        self.writer.publish(
            PublishRequest(
                step,
                part,
                parts,
                None if self.args.save_only_model else commit,
                self.args.save_total_limit,
                self.state.best_model_checkpoint,
            )
        )

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is complete, and report it. Collective.

        The workers ask each other in short collectives: none of them waits for long in one.
        """
        if self._saved_step is None or self._reported_step == self._saved_step:
            return
        while not all(self._gather_flags(self.writer.wait(PUBLISH_WAIT_SECONDS))):
            pass
        self._reported_step = self._saved_step
        if self.context.on_checkpoint:
            with collective("reporting a checkpoint"):
                self.context.on_checkpoint(checkpoint_path(self.storage, self._saved_step))

    def _gather_flags(self, value: bool) -> list[int]:
        """Return the value of every worker, 0 or 1. Collective."""
        with collective("saving a checkpoint"):
            return self.accelerator.gather(torch.tensor([int(value)], device=self.args.device)).tolist()

    def _finalize_training(self, *args: Any) -> Any:
        """Complete the last checkpoint; with --save_total_limit 1 keep only the best one."""
        self.wait_for_checkpoint()
        result = super()._finalize_training(*args)
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best:
            for path in list_checkpoints(self.storage):
                if checkpoint_name(path) != checkpoint_name(best):
                    delete_checkpoint(path)
        return result

    def _get_output_dir(self, trial: Any) -> str:
        """Return the staging folder: the Trainer writes checkpoints there, and finds no old ones to delete."""
        return str(self.staging.folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save a model folder like any other. training_args.bin is not written: it contains the hub's token."""
        if self.args.should_save:
            self._write(lambda: self.encoder.save(output_dir or str(self.args.output_dir), state_dict))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save = partial(super()._save_optimizer_and_scheduler, output_dir)
        # Shards are written by all workers together: one of them cannot retry alone.
        save() if self.is_fsdp_enabled or self.is_deepspeed_enabled else self._write(save)

    def _save_scaler(self, output_dir: str) -> None:
        self._write(partial(super()._save_scaler, output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        self._write(partial(super()._save_rng_state, output_dir))

    def _write(self, action: Callable[[], None]) -> None:
        self.writer.write(self.state.global_step, action)

    def gather_weights(self) -> dict[str, torch.Tensor] | None:
        """Return a sharded model's complete weights by name, on worker 0; None if they are not sharded. Collective."""
        if self.is_fsdp_enabled:
            return self.accelerator.get_state_dict(self.model)
        return self.accelerator.get_state_dict(self.deepspeed) if self.is_deepspeed_enabled else None

    # --- loading ---

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Restrict the loads of FSDP and DeepSpeed, which read their own files here."""
        with safe_loading(resume_from_checkpoint, "state"):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.encoder.load_weights(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Resume with the learning rate of the flags, which may differ from that in the checkpoint."""
        base_rates: Any = getattr(self.lr_scheduler, "base_lrs", None)
        with safe_loading(checkpoint, "optimizer or scheduler"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LambdaLR):
            self.lr_scheduler.base_lrs = base_rates
            factors = [factor(self.lr_scheduler.last_epoch) for factor in self.lr_scheduler.lr_lambdas]
            rates = [base * factor for base, factor in zip(base_rates, factors, strict=True)]
            set_logged_rates(self.lr_scheduler, rates)
            for group, base, rate in zip(self.optimizer.param_groups, base_rates, rates, strict=True):
                group["initial_lr"], group["lr"] = base, rate

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Ignore the scaler of a run in half precision that is resumed without it."""
        if getattr(self.accelerator, "scaler", None) is None:
            return
        with safe_loading(checkpoint, "scaler"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with safe_loading(checkpoint, "random state"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        # A URI in the state is redacted: the real one has to be assembled.
        path = checkpoint_path(self.storage, self.state.best_global_step) if "://" in best else best
        folder = self.staging.fetch(path)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.state.best_model_checkpoint = folder
            with safe_loading(folder, "best model"):
                super()._load_best_model()
            self.state.best_model_checkpoint = best
        else:
            self.encoder.load_weights(folder)
        self.accelerator.wait_for_everyone()  # before one of them deletes what was fetched
