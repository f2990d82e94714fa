"""transformers' Trainer on a worker's own stream: position in the data, loss, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME

from raybge.compat.hooked_trainer import HookedTrainer
from raybge.data.stream import StepStream
from raybge.evaluation.query_examples import RetrievalResult
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.training.averaging_spec import AveragingPlan
from raybge.training.callbacks.nonfinite_guard import NonFiniteGuard
from raybge.training.callbacks.state_loader import FIRST_RESULT, StateLoader
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
from raybge.training.checkpoint.training_state import (
    load_random_state,
    load_sharded_model,
    save_training_state,
)
from raybge.training.checkpoint.writer import CheckpointWriter, PublishRequest, StagingFolder
from raybge.training.memory_errors import out_of_memory
from raybge.training.row_records import RowWriter
from raybge.training.score_sampling import ScoreSampler
from raybge.training.sharding import call_sharded, prepare_sharding
from raybge.training.step_metrics import StepRecorder
from raybge.training.tasks.task import TaskComponents
from raybge.training.weight_averages import EmaCallback, WeightEma
from raybge.util.activity import READING, STARTING, activity, collective, current_activity, phase, set_activity
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
        averaging: averages of the weights that the run makes.
    """

    identity: RunIdentity
    validation: RetrievalValidator | None = None
    on_checkpoint: Callable[[str], None] | None = None
    initial_metrics: Mapping[str, float] | None = None
    row_writer: RowWriter | None = None
    nonfinite_guard: NonFiniteGuard | None = None
    storage: str | None = None
    attempt: str | None = None
    averaging: AveragingPlan = AveragingPlan()


class StreamTrainer(HookedTrainer):
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
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            prepare_sharding(plugin, self.args.fsdp_config, components.encoder.model.backbone)
        self.step_metrics = StepRecorder()
        self.score_sampler = ScoreSampler(components.model)
        self.first_result: RetrievalResult | None = None  # of each query before the first step
        self.ema: WeightEma | None = None
        if context.averaging.ema is not None:
            self.add_callback(EmaCallback(self, context.averaging.ema))
        self.storage = context.storage or str(self.args.output_dir)
        self.staging = StagingFolder(self.storage, context.attempt or uuid.uuid4().hex)
        local_rank = self.args.local_process_index
        self.writer = CheckpointWriter(self.storage, self.staging, self.args.process_index, local_rank)
        self.callback_handler.callbacks.insert(0, StateLoader(self))  # others begin with the state
        self._random_state_pending = False
        self._last_batch: Any = None
        self._saved_step: int | None = None  # update of the last checkpoint that was written
        self._reported_step: int | None = None  # update of the last one passed to `on_checkpoint`

    def train(self, resume_from_checkpoint: str | None = None) -> transformers.trainer_utils.TrainOutput:
        """Train from the beginning or from a checkpoint, until its last checkpoint is complete. Collective.

        Args:
            resume_from_checkpoint: local folder of the checkpoint.

        Returns:
            The Trainer's metrics. The model is the last one, or the best one with --load_best_model_at_end.

        Raises:
            UserError: a file of the checkpoint is refused, or the memory of a GPU is too small.
        """
        self.resume_folder = resume_from_checkpoint
        self._random_state_pending = resume_from_checkpoint is not None
        if resume_from_checkpoint and not self.is_sharded:  # a sharded model is loaded once it is sharded
            self.encoder.load_weights(resume_from_checkpoint)
        try:
            return super().train()
        except torch.OutOfMemoryError as error:
            step = self.state.global_step + 1
            raise out_of_memory(self.components.model, self._last_batch, step, error) from error

    def complete_checkpoints(self) -> None:
        """Wait for the last checkpoint; with --save_total_limit 1 keep the best one only. Collective."""
        self.resolve_update()
        self.wait_for_checkpoint()
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best:
            for path in list_checkpoints(self.storage):
                if checkpoint_name(path) != checkpoint_name(best):
                    delete_checkpoint(path)

    @property
    def is_sharded(self) -> bool:
        """True if FSDP or DeepSpeed keeps the model or the state of its optimizer in shards."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # --- position in the stream ---

    def get_train_dataloader(self) -> StepStream:
        """Return the stream: accelerate would otherwise dispatch the batches of rank 0 to all workers."""
        return self.stream

    def restore_state(self, max_steps: int) -> None:
        """Log, evaluate and save in a resumed run according to its own flags, not to those in the checkpoint."""
        self.state.compute_steps(self.args, max_steps)
        best = self.state.best_global_step
        if best and not self.state.best_model_checkpoint:  # the Trainer searches for it in folders only
            path = checkpoint_path(self.storage, best)
            self.state.best_model_checkpoint = redact(path) if is_complete(path) else None

    def updates_done(self, epoch: int, updates: int) -> int | None:
        """Start the stream at the position of the checkpoint, without reading anything before it."""
        if self.state.global_step >= self.state.max_steps:  # a run that was lost after its last checkpoint
            return None
        if self.resume_folder and self._random_state_pending:  # last, since an evaluation at the start may draw
            load_random_state(self, self.resume_folder)
            self._random_state_pending = False
        done = self.state.global_step - epoch * updates
        self.stream.start_step = done * self.args.gradient_accumulation_steps
        return done

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
        return torch.where(loss.isfinite(), loss, self.mean_logged_loss)

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Run the forward pass and record its measurements. Return the scalar loss of this worker's share."""
        self._last_batch = batch = inputs["batch"]
        step = self.state.global_step + 1
        if self.context.row_writer:
            self.context.row_writer.write(self.stream.epoch, batch.step, step, batch.rows)
        set_activity(f"the forward pass of step {step:,}", has_collective=True)
        sampling = self.score_sampler.sampling(self.state.global_step, self.state.max_steps)
        # accelerate runs the model under autocast, but not one that is sharded.
        autocast = self.accelerator.autocast() if self.is_fsdp_enabled else contextlib.nullcontext()
        with contextlib.nullcontext() if self.stream.rank else sampling, autocast:
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

    def check_gradients(self, model: nn.Module, norm: Any) -> Any:
        """Delete gradients that are not finite, or have the optimizer ignore them: the update has no effect."""
        is_plain = isinstance(norm, float | torch.Tensor) and not isinstance(norm, DTensor)
        if self.stream.rank == 0 and is_plain:
            self.step_metrics.add_norm(norm)
        # DeepSpeed's backward pass has applied the update already.
        if self.nonfinite_guard and not self.is_deepspeed_enabled:
            self.resolve_update()
            scaled = self.accelerator.scaler is not None
            # A scaler waits for the device in each update anyway.
            update, optimizer = self.state.global_step + 1, self.optimizer.optimizer
            if is_plain and not scaled and self.nonfinite_guard.leaves_to(optimizer, norm, update):
                return norm
            skips = self.nonfinite_guard.should_skip(norm, update, self._finite_rows, scaled)
            if skips and not scaled:
                model.zero_grad(set_to_none=True)  # optimizers ignore parameters without gradient, momentum included
        return norm

    def resolve_update(self) -> None:
        """Report the last update if it was not finite, where that is not known yet. Collective if so."""
        if self.nonfinite_guard:
            self.nonfinite_guard.resolve(self._finite_rows)

    def _finite_rows(self, batch: Any) -> list[bool] | None:
        """Return for each group whether its embeddings are finite; None if the model is not contrastive."""
        if not isinstance(self.components.model, ContrastiveModel):
            return None
        with self.accelerator.autocast():  # an overflow of fp16 is one in fp16 alone
            return call_sharded(self.model, lambda: self.components.model.finite_groups(batch))

    # --- evaluation ---

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluate the model on all workers together; the metrics are logged as `eval_NAME`."""
        assert self.validation is not None
        self.resolve_update()
        start = time.monotonic()
        values = None if self.state.global_step else self.context.initial_metrics
        if values is None:
            step = self.state.global_step
            when = "" if 0 < step < self.state.max_steps else " after training" if step else " before training"
            values = self.measure(when)
            if not step:
                self.first_result = self.validation.last_result
        metrics = {f"eval_{name}": value for name, value in values.items()}
        metrics["eval_runtime"] = round(time.monotonic() - start, 4)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, name: str) -> dict[str, float]:
        """Return the retrieval metrics of the model as it is; `name` follows «evaluating» on the screen. Collective."""
        assert self.validation is not None
        validation, step = self.validation, self.state.global_step
        # The encoder is not the module that accelerate has wrapped.
        with self.step_metrics.paused(), activity("an evaluation"), phase(f"evaluating{name}"):
            with self.accelerator.autocast():
                return call_sharded(self.model, lambda: validation.measure(self.encoder, step))

    def query_examples(self) -> list[QueryExample]:
        """Return the queries that the report shows, on worker 0. Collective.

        There are none unless the model was evaluated both before the first step and at the end.
        """
        if self.validation is None or self.first_result is None or self.validation.last_result is None:
            return []
        return self.validation.examples(self.first_result, self.validation.last_result)

    # --- saving ---

    def save_checkpoint(self) -> None:
        """Write a checkpoint and start to publish it; nothing if this update's has been written. Collective."""
        self.resolve_update()
        with self.step_metrics.paused(), activity("saving a checkpoint"), phase("saving a checkpoint"):
            self.wait_for_checkpoint()
            if self._saved_step != self.state.global_step:
                self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        """Have every worker write its part on its node, and start to publish it in the background."""
        step = self.state.global_step
        self.writer.prepare(step)
        with collective("saving a checkpoint"):
            self.accelerator.wait_for_everyone()
        folder = str(self.staging.folder / checkpoint_name(checkpoint_path(self.storage, step)))
        write = partial(self.writer.write, step)
        if not self.is_fsdp_enabled or "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            weights = self.gather_weights()
            if self.args.should_save:
                write(lambda: self.encoder.save(folder, weights))
        if not self.args.save_only_model:
            save_training_state(self, folder, write)
            if self.ema is not None:
                self.ema.save(folder, self.args.should_save, write)
            if self.first_result and self.args.should_save:
                write(partial(self.first_result.save, os.path.join(folder, FIRST_RESULT)))
        if step == self.state.best_global_step:
            self.state.best_model_checkpoint = redact(checkpoint_path(self.storage, step))
        self.store_flos()  # collective
        if self.args.should_save:
            write(lambda: self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME)))
        publishers = self._gather_flags(self.writer.is_publisher)  # after this, every worker has written its part
        self._saved_step = step
        if not self.writer.is_publisher:
            return
        epoch, position = self.position()
        identity = self.context.identity
        commit = partial(commit_checkpoint, step=step, epoch=epoch, position=position, identity=identity)
        # Without the optimizer it is a model to use, and not a checkpoint to resume from.
        completion = None if self.args.save_only_model else commit
        part, parts = sum(publishers[: self.args.process_index]), sum(publishers)
        limit = self.args.save_total_limit, self._kept_checkpoints()
        self.writer.publish(PublishRequest(step, part, parts, completion, *limit))

    def _kept_checkpoints(self) -> list[str]:
        """Return the paths of checkpoints that --save_total_limit must not delete."""
        best = self.state.best_model_checkpoint
        return [checkpoint_path(self.storage, n) for n in self.context.averaging.steps] + ([best] if best else [])

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

    def gather_weights(self) -> dict[str, torch.Tensor] | None:
        """Return a sharded model's complete weights by name, on worker 0; None if they are not sharded. Collective."""
        if self.is_fsdp_enabled:
            return self.accelerator.get_state_dict(self.model)
        return self.accelerator.get_state_dict(self.deepspeed) if self.is_deepspeed_enabled else None

    def load_best_model(self) -> None:
        """Load the model of the best checkpoint. Collective."""
        # A URI in the state is redacted: the real one has to be assembled.
        best = str(self.state.best_model_checkpoint)
        path = checkpoint_path(self.storage, self.state.best_global_step) if "://" in best else best
        self.load_weights(path)

    def load_weights(self, path: str) -> None:
        """Load the model of a checkpoint, given its folder or URI. Collective."""
        folder = self.staging.fetch(path)
        if self.is_sharded:
            with safe_loading(folder, "model"):
                load_sharded_model(self, folder)
        else:
            self.encoder.load_weights(folder)
        self.accelerator.wait_for_everyone()  # before one of them deletes what was fetched
