"""transformers' Trainer on a worker's own stream: position, loss, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from raybge.data.stream import StepStream
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.training.callbacks.nonfinite_guard import BadSteps
from raybge.training.checkpoint.manifest import Identity, discard, is_whole, name_of, numbered, path_of, seal
from raybge.training.checkpoint.safe_load import plainly_loaded
from raybge.training.checkpoint.writer import CheckpointWriter, Publishing, Scratch
from raybge.training.row_records import Lines
from raybge.training.step_metrics import StepLog, batch_scores
from raybge.training.tasks.task import Learner
from raybge.util.activity import READING, STARTING, at, collective, during, here
from raybge.util.redaction import public

if TYPE_CHECKING:
    from raybge.evaluation.in_training import Validation
    from raybge.evaluation.query_examples import Retrieved, Shown
    from raybge.training.step_metrics import BatchScores

SETTLE_SECONDS = 1.0  # between looks whether a checkpoint is published


class StreamTrainer(transformers.Trainer):
    """transformers' Trainer on a stream that is already this worker's own share.

    Args:
        stream: of the worker; the Trainer's epochs are its epochs.
        learner: what is trained.
        identity: written into each checkpoint.
        validation: measures its encoder, None where there is no --eval_data.
        on_checkpoint: called on every worker with the path of each checkpoint, once it is whole and training is at a
            place where all workers are.
        before: what `validation` finds of the model before its first step, where that is known.
        lines: where each step's rows are written down.
        bad_steps: leaves out updates that are not finite.
        storage: where checkpoints lie, a folder or a URI; left out, the output folder of the Trainer's arguments.
        attempt: a name that this start of the workers has alone.
    """

    control: Any  # the Trainer's
    loss_is_scaled_for_ga = False  # a step's loss is a mean: the Trainer divides it by the steps of an update

    def __init__(
        self,
        stream: StepStream,
        learner: Learner,
        identity: Identity,
        validation: Validation | None = None,
        on_checkpoint: Callable[[str], None] | None = None,
        before: Mapping[str, float] | None = None,
        lines: Lines | None = None,
        bad_steps: BadSteps | None = None,
        storage: str | None = None,
        attempt: str | None = None,
        **kwargs: Any,
    ):
        # The Trainer wants a data set where it is to evaluate; it is `validation` that knows it.
        super().__init__(eval_dataset=range(0) if validation else None, model=learner.model, **kwargs)
        self.stream = stream
        self.learner = learner
        self.encoder = learner.encoder
        self.identity = identity
        self.validation = validation
        self.on_checkpoint = on_checkpoint
        self.before = before
        self.lines = lines
        self.bad_steps = bad_steps
        # The Trainer's own filter waits for the device twice a step.
        self.filters_losses, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        self.steps = StepLog()
        self.scores: list[BatchScores] = []  # of the first step and of the last
        self.first: Retrieved | None = None  # what `validation` finds before the first step, query by query
        self.storage = storage or str(self.args.output_dir)
        self.scratch = Scratch(self.storage, attempt or uuid.uuid4().hex)
        local_rank = self.args.local_process_index
        self.writer = CheckpointWriter(self.storage, self.scratch, self.args.process_index, local_rank)
        self.saved: int | None = None  # the last update with a checkpoint
        self.told: int | None = None  # the last that `on_checkpoint` has heard of

    # --- the stream's position ---

    def get_train_dataloader(self) -> StepStream:
        return self.stream

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """A resumed run logs, evaluates and saves as its own flags say, not as those in the checkpoint."""
        found = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        best = self.state.best_global_step
        if best and not self.state.best_model_checkpoint:  # the Trainer looks for it in folders alone
            path = path_of(self.storage, best)
            self.state.best_model_checkpoint = public(path) if is_whole(path) else None
        return found

    def _run_epoch(self, **about: Any) -> None:
        """The Trainer's epoch from where a checkpoint left it: the stream starts there and nothing is read before it.

        The Trainer would ask accelerate to skip batches of a DataLoader. It is told of an epoch of the remaining
        length instead; an epoch that starts at its beginning is the same thing with nothing done.
        """
        if self.state.global_step >= self.state.max_steps:  # a run that stopped after its last checkpoint
            self.control.should_training_stop = True
            return
        done = self.state.global_step - about["epoch"] * about["num_update_steps_per_epoch"]
        self.stream.start_step = done * self.args.gradient_accumulation_steps
        about["num_update_steps_per_epoch"] -= done
        about["steps_in_epoch"] -= self.stream.start_step
        super()._run_epoch(**about)

    def get_batch_samples(self, *args: Any) -> Any:
        if here().doing == STARTING:
            return super().get_batch_samples(*args)
        with during(READING):
            return super().get_batch_samples(*args)

    def position(self) -> tuple[int, int]:
        """(epoch, steps of its stream) that are done."""
        updates = -(-len(self.stream) // self.args.gradient_accumulation_steps)
        epoch, done = divmod(self.state.global_step, updates)
        return epoch, done * self.args.gradient_accumulation_steps

    # --- the loss ---

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss as it is to be logged, with --logging_nan_inf_filter the mean so far where it is not finite."""
        loss = super().training_step(*args, **kwargs)
        if not self.filters_losses:
            return loss
        mean: Any = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(loss.isfinite(), loss, mean)

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        batch = inputs["batch"]
        if self.lines:
            self.lines.write(self.stream.epoch, batch.step, self.state.global_step + 1, batch.rows)
        at(f"the forward pass of step {self.state.global_step + 1:,}", shared=True)
        with contextlib.nullcontext() if self.stream.rank else self._watched():
            loss = model(**inputs)
        if self.stream.rank == 0:  # it alone reports
            # The loss is scaled for the mean over workers (see Objective): this undoes it.
            total = loss.detach() * self.stream.order.size(self.stream.epoch, batch.step) / self.stream.world
            self.steps.step(total, batch)
        at(f"the backward pass of step {self.state.global_step + 1:,}", shared=True)
        if self.bad_steps:
            loss = self.bad_steps.step(loss, batch)
            if self.is_deepspeed_enabled:
                self.bad_steps.check(self.state.global_step + 1, self._sound)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The Trainer asks for it before each update: where it is not finite, nothing is left to update with."""
        norm = super()._get_grad_norm(model, grad_norm)
        # DeepSpeed's backward pass makes the update too.
        if self.bad_steps and not self.is_deepspeed_enabled:
            scaled = self.accelerator.scaler is not None
            if self.bad_steps.end(norm, self.state.global_step + 1, self._sound, scaled) and not scaled:
                model.zero_grad(set_to_none=True)  # an optimizer leaves alone what has no gradient, momentum included
        return norm

    def _sound(self, batch: Any) -> list[bool] | None:
        """Which groups have embeddings that are finite; None where the model is not contrastive."""
        if not isinstance(self.learner.model, ContrastiveModel):
            return None
        with gathered(self.model), self.compute_loss_context_manager():
            return self.learner.model.sound(batch)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Keep the scores of a step in the block where it is of the first update or of the last.

        The last of an epoch may have no rows for this worker: then those of the one before stay.
        """
        step = self.state.global_step
        learning = self.learner.model  # as it is inside of what wraps it
        if not isinstance(learning, ContrastiveModel):
            yield
            return
        if self.scores and (step == self.scores[0].step - 1 or step < self.state.max_steps - 2):
            yield
            return
        found: list[BatchScores] = []
        learning.watch = lambda e_ND, batch: found.append(batch_scores(step + 1, e_ND, batch))
        try:
            yield
        finally:
            learning.watch = None
        if found and found[0].positives:
            self.scores = [*self.scores[:1], *found]

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        """Tokens of the texts themselves: nothing here pads a whole batch."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        own = torch.tensor(sum(map(len, inputs["batch"].token_ids)), device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(own).sum().item())

    # --- evaluation ---

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the model on all workers together; the metrics are logged as `eval_NAME`."""
        assert self.validation is not None
        start = time.monotonic()
        found = None if self.state.global_step else self.before
        if found is None:
            with self.steps.aside(), during("an evaluation"), gathered(self.model):
                found = self.validation.measure(self.encoder)
            if not self.state.global_step:
                self.first = self.validation.last
        metrics = {f"eval_{name}": value for name, value in found.items()}
        metrics["eval_runtime"] = round(time.monotonic() - start, 4)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def shown_queries(self) -> list[Shown]:
        """What the report shows of the queries, on worker 0; none where this run has not measured both its beginning
        and its end. Collective.
        """
        if self.validation is None or self.first is None or self.validation.last is None:
            return []
        return self.validation.shown(self.first, self.validation.last)

    # --- checkpoints ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.steps.aside(), during("saving a checkpoint"):
            self.settle()
            if self.saved != self.state.global_step:
                self._save_whole(model, trial)

    def _save_whole(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, written on this node by every worker; from there it is published aside."""
        step = self.state.global_step
        self.writer.begin(step)
        with collective("saving a checkpoint"):
            self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        if step == self.state.best_global_step:
            self.state.best_model_checkpoint = public(path_of(self.storage, step))
        if self.args.should_save:  # again: the Trainer takes the best one to lie where it writes
            state = f"{self._get_output_dir(trial)}/checkpoint-{step}/trainer_state.json"
            self._write(lambda: self.state.save_to_json(state))
        publishers = self._gathered(self.writer.publishes)  # here everyone has written its part
        self.saved = step
        if not self.writer.publishes:
            return
        # Without the optimizer it is a model to use, not a place to continue from.
        whole = None if self.args.save_only_model else partial(self._seal, step, *self.position())
        part, parts = sum(publishers[: self.args.process_index]), sum(publishers)
        best = self.state.best_model_checkpoint
        self.writer.publish(Publishing(step, part, parts, whole, self.args.save_total_limit, best))

    def _seal(self, step: int, epoch: int, position: int, folder: Path) -> None:
        seal(folder, step, epoch, position, self.identity)

    def finish_saving(self, timeout: float | None = None) -> bool:
        """Wait, at most `timeout` seconds, until what this worker has saved lies where checkpoints are kept: on worker
        0 the checkpoint is whole then. False where it is not yet. UserError where it cannot be.
        """
        return self.writer.finish(timeout)

    def settle(self) -> None:
        """Wait until the last checkpoint is whole. Collective, and in short ones: no worker waits for long in one."""
        if self.saved is None or self.told == self.saved:
            return
        while not all(self._gathered(self.finish_saving(SETTLE_SECONDS))):
            pass
        self.told = self.saved
        if self.on_checkpoint:
            with collective("reporting a checkpoint"):
                self.on_checkpoint(path_of(self.storage, self.saved))

    def _gathered(self, value: bool) -> list[int]:
        """Every worker's value, 0 or 1. Collective."""
        with collective("saving a checkpoint"):
            return self.accelerator.gather(torch.tensor([int(value)], device=self.args.device)).tolist()

    def _finalize_training(self, *args: Any) -> Any:
        self.settle()
        result = super()._finalize_training(*args)
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best:
            for path in [each for each in numbered(self.storage) if name_of(each) != name_of(best)]:
                discard(path)
        return result

    def _get_output_dir(self, trial: Any) -> str:
        """Where the Trainer writes its checkpoints, and removes old ones: there are none."""
        return str(self.scratch.folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint is a model folder like any other. training_args.bin is left out: it holds the hub's token."""
        if self.args.should_save:
            self._write(lambda: self.encoder.save(output_dir or str(self.args.output_dir), state_dict))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save = partial(super()._save_optimizer_and_scheduler, output_dir)
        # Shards are written by all workers together: one of them cannot try again alone.
        save() if self.is_fsdp_enabled or self.is_deepspeed_enabled else self._write(save)

    def _save_scaler(self, output_dir: str) -> None:
        self._write(partial(super()._save_scaler, output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        self._write(partial(super()._save_rng_state, output_dir))

    def _write(self, action: Callable[[], None]) -> None:
        self.writer.write(self.state.global_step, action)

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The weights by name where those in memory are shards, on worker 0; None where they are whole. Collective."""
        if self.is_fsdp_enabled:
            return self.accelerator.get_state_dict(self.model)
        return self.accelerator.get_state_dict(self.deepspeed) if self.is_deepspeed_enabled else None

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """FSDP and DeepSpeed read their own files in here."""
        with plainly_loaded(resume_from_checkpoint, "state"):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.encoder.load_weights(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """With the learning rate of the flags, which may be another than the checkpoint's."""
        given: Any = getattr(self.lr_scheduler, "base_lrs", None)
        with plainly_loaded(checkpoint, "optimizer or scheduler"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LambdaLR):
            self.lr_scheduler.base_lrs = given
            shares = [share(self.lr_scheduler.last_epoch) for share in self.lr_scheduler.lr_lambdas]
            rates = [base * share for base, share in zip(given, shares, strict=True)]
            self.lr_scheduler._last_lr = rates  # what is logged
            for group, base, rate in zip(self.optimizer.param_groups, given, rates, strict=True):
                group["initial_lr"], group["lr"] = base, rate

    def _load_scaler(self, checkpoint: str | None) -> None:
        """None where this run has none: that of a run in half precision, resumed without it."""
        if getattr(self.accelerator, "scaler", None) is None:
            return
        with plainly_loaded(checkpoint, "scaler"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with plainly_loaded(checkpoint, "random state"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        # Of a store the state holds no more than may be read by anyone.
        path = self.scratch.fetched(path_of(self.storage, self.state.best_global_step) if "://" in best else best)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.state.best_model_checkpoint = path
            with plainly_loaded(path, "best model"):
                super()._load_best_model()
            self.state.best_model_checkpoint = best
        else:
            self.encoder.load_weights(path)
        self.accelerator.wait_for_everyone()  # before one of them removes what was fetched


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights in place while the block runs, where FSDP keeps them in shards. Collective."""
    sharded: list[Any] = [m for m in model.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
