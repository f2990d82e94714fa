"""Controller of a training run: starts the workers, shows progress, restarts after a lost worker.

Restarts are counted here instead of by Ray Train's FailureConfig: errors that the user has to fix are never retried,
the console says where a restart continues, and Ctrl-C ends the run after the current step (see signals.py).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.training.checkpoint.manifest import checkpoint_name, latest_checkpoint
from raybge.training.health.heartbeat import WorkerStallError
from raybge.training.health.run_state import RunStateLostError
from raybge.training.signals import SignalHandler
from raybge.util.activity import STARTING
from raybge.util.errors import CORRECTABLE, causes
from raybge.util.redaction import redact

if TYPE_CHECKING:
    from raybge.cli.console import Console
    from raybge.cli.progress_bar import ProgressBar
    from raybge.cluster.resources import Plan
    from raybge.training.elastic import ElasticPolicy
    from raybge.training.health.run_state import Progress
    from raybge.training.runtime import Runtime, WorkerSettings
    from raybge.training.worker_config import EvaluationCallback, WorkerConfig

POLL_SECONDS = 0.2
STARTING_WORKERS = "starting the workers"


@dataclass
class TrainingController:
    """Controller of one training run.

    Args:
        config: configuration of each worker.
        plan: number of workers and the resources of each.
        process_group: arguments of Ray Train's TorchConfig.
        storage: folder or URI of the checkpoints.
        records: folder for the runtime's own records.
        runtime: starts and ends the workers.
        max_failures: restarts after a failure; -1 for no limit.
        on_evaluation: called in the main thread with the metrics of each evaluation.
        elastic: policy of an elastic run; None if the number of workers is fixed.
    """

    config: WorkerConfig
    plan: Plan
    process_group: dict[str, Any]
    storage: str
    records: Path
    runtime: Runtime
    max_failures: int = 0
    on_evaluation: EvaluationCallback | None = None
    elastic: ElasticPolicy | None = None
    reported_evaluations: int = 0  # evaluations passed to `on_evaluation`
    printed_evaluation: int = -1  # step of the last evaluation shown on the console
    printed_messages: int = 0  # messages of the workers shown on the console
    console: Console = field(init=False)
    resume_from: str | None = field(init=False)  # checkpoint that the next attempt continues from
    reading_cpus: float = field(init=False)  # CPUs of each worker's reading in the next attempt

    def __post_init__(self) -> None:
        """Take the start of the first attempt from the configuration."""
        self.resume_from, self.reading_cpus = self.config.resume_from, self.config.reading_cpus

    def run(self, console: Console) -> dict[str, Any]:
        """Run until training has finished, with restarts.

        Args:
            console: shows the progress bar and the messages.

        Returns:
            The results of the run: the Trainer's final metrics, and the changes of the retrieval metrics.

        Raises:
            BaseException: the exception of a worker when no restart is left.
        """
        run_state, self.console = self.config.run_state, console
        failures = 0
        with console.bar("train", None, self.config.task.spec.row_noun, start_up=STARTING_WORKERS) as bar:
            saves = self.config.training.get("save_strategy") != "no"
            with SignalHandler(run_state, self.storage, saves, console.message, console.resume_command) as signals:
                while (error := self._attempt(bar, signals)) is not None:
                    cause = _root_cause(error)
                    workers = self._next_worker_count(cause, signals)
                    failures += workers is None
                    if workers is None and (isinstance(cause, CORRECTABLE) or not self._may_restart(failures)):
                        raise cause from error
                    if console.shows_messages:
                        print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
                    self._prepare_restart(error, failures, workers)
        return run_state.read().metrics

    def _next_worker_count(self, cause: BaseException, signals: SignalHandler) -> int | None:
        """Return the worker count for the next attempt if the cluster changed; None if the workers failed."""
        if self.elastic is None or isinstance(cause, CORRECTABLE):
            return None
        # An exception of Ray or of a broken connection may be caused by a lost node.
        lost = type(cause).__module__.startswith("ray.") or _is_collateral(cause)
        return self.elastic.workers_after_failure(self.plan, lost, self.console.message, signals.raise_if_signaled)

    def _prepare_restart(self, error: BaseException, failures: int, workers: int | None) -> None:
        """Resume from the latest checkpoint, with `workers` workers if the cluster changed."""
        if checkpoint := latest_checkpoint(self.storage):
            self.resume_from = checkpoint.path
        path = self.resume_from
        start = f"continues from {checkpoint_name(path)}" if path else "starts again from the beginning"
        if self.elastic and workers is not None:
            previous = self.plan.workers
            self.plan, self.reading_cpus = self.elastic.resize(self.plan, workers)
            size = replace(self.plan, range=None).describe("worker")
            message = f"the cluster changed: {start} with {size}, {previous} before"
        else:
            limit = f" of {self.max_failures}" if self.max_failures > 0 else ""
            message = f"a worker failed ({_summarize(_root_cause(error))}): {start}, restart {failures}{limit}"
        self.console.message(message)

    def _may_restart(self, failures: int) -> bool:
        return self.max_failures == -1 or failures <= self.max_failures

    def _attempt(self, bar: ProgressBar, signals: SignalHandler) -> BaseException | None:
        """Start the workers once and watch them; return the error that ended them, None if training finished.

        Runs in the main thread, the only one that receives signals.
        """
        self._prepare_attempt()
        errors: list[BaseException] = []
        thread = threading.Thread(target=self._run_workers, args=(errors,), daemon=True)
        stall: str | None = None
        with self._workers_killed_on_error():
            thread.start()
            while thread.is_alive():
                thread.join(POLL_SECONDS)
                self._report(bar)
                signals.poll()
                if stall is None and (stall := self._describe_stall()):
                    self._kill_workers()
                if self.elastic:
                    self.elastic.check_growth(self.plan, self.config.run_state)
        self._report(bar)
        error = WorkerStallError(stall) if stall else errors[0] if errors else None
        if signals.received is not None:
            if error:
                self.console.message(f"a worker failed ({_summarize(_root_cause(error))})")
            raise signals.exception()
        return error

    def _prepare_attempt(self) -> None:
        """Make the attempt's configuration and reset what the previous attempt left."""
        if self.elastic:
            self.elastic.start_attempt()
        self.config = self.config.for_attempt(self.plan.workers, self.reading_cpus, self.resume_from)
        self.runtime.release(self.config.output_dir)  # an attempt that was killed did not
        self.config.run_state.clear_workers()

    def _describe_stall(self) -> str | None:
        """Describe the workers that have kept the others waiting for too long; None if there are none."""
        if not self.config.stall_timeout:
            return None
        try:
            return self.config.run_state.describe_stall(self.config.stall_timeout)
        except RunStateLostError:
            return None

    def _report(self, bar: ProgressBar) -> None:
        """Update the bar, and pass on new messages and evaluations."""
        try:
            progress = self.config.run_state.read()
        except RunStateLostError:
            return  # the runtime was shut down with the run
        _update_bar(progress, self.config, bar)
        for line in progress.messages[self.printed_messages :]:
            self.console.message(line)
            self.printed_messages += 1
        for step, metrics in progress.evaluations[self.reported_evaluations :]:
            if step != self.printed_evaluation:  # it is passed on only once its checkpoint is complete
                self.console.info(_evaluation_line(step, metrics, progress))
                self.printed_evaluation = step
            if self.on_evaluation and not self.on_evaluation(step, progress.total, metrics):
                return
            self.reported_evaluations += 1

    @contextlib.contextmanager
    def _workers_killed_on_error(self) -> Iterator[None]:
        """Kill the workers if the block raises: a Ray cluster that outlives this program would run them on."""
        try:
            yield
        except BaseException:
            self._kill_workers()
            raise

    def _kill_workers(self) -> None:
        with contextlib.suppress(RunStateLostError):
            self.config.run_state.kill_workers()

    def _run_workers(self, errors: list[BaseException]) -> None:
        """Run the workers until the attempt ends; an exception is appended to `errors` for the main thread."""
        try:
            self.runtime.run_workers(_train_worker, self.config, self.plan, self.process_group, self.records)
        except BaseException as error:
            errors.append(error)


def _train_worker(settings: WorkerSettings) -> None:
    """Run in each worker. transformers, which takes seconds to import, is imported only there."""
    from raybge.training.worker import train_worker

    train_worker(settings)


def _update_bar(progress: Progress, config: WorkerConfig, bar: ProgressBar) -> None:
    """Show rows, loss and step on the progress bar, and what worker 0 does if that is no step."""
    bar.set_activity(_describe_activity(progress))
    if not progress.total:
        return
    order, accumulation_steps = config.order, config.identity.gradient_accumulation_steps

    def rows(updates: int) -> int:
        epochs, rest = divmod(updates, -(-order.steps // accumulation_steps))
        return order.total * epochs + min(rest * accumulation_steps * order.global_batch, order.total)

    bar.total = rows(progress.total)
    parts = [] if progress.loss is None else [f"loss {progress.loss:.4f}"]
    parts.append(f"step {progress.step:,}/{progress.total:,}")
    bar.note = ", ".join(parts)
    bar.extra_seconds = progress.evaluation_seconds  # there is one more at the end
    bar.move_to(rows(progress.step))
    if progress.started_at is not None and not bar.activity:
        bar.begin()


def _describe_activity(progress: Progress) -> str:
    """Return what worker 0 does; empty for a step."""
    activity = progress.activity
    if activity is None or (activity.name == STARTING and progress.started_at is None and not activity.phase):
        return STARTING_WORKERS
    return activity.phase or ("reading the first rows" if activity.name == STARTING else "")


def _evaluation_line(step: int, metrics: Mapping[str, float], progress: Progress) -> str:
    """Return the line on an evaluation, with the differences from the one before training."""
    first_step, first = progress.evaluations[0]
    before = first if step and not first_step else {}
    texts = [
        f"{name} {value:.4f}" + (f" ({value - before[name]:+.4f})" if name in before else "")
        for name, value in metrics.items()
    ]
    return f"{f'step {step:,} of {progress.total:,}' if step else 'before training'}: {', '.join(texts)}"


def _root_cause(error: BaseException) -> BaseException:
    """Return the exception that a worker raised, without the wrappers of Ray Train and Ray.

    If several workers failed, the first failure made others fail in their collectives: a UserError is preferred, then
    an error that is not a broken connection.
    """
    for each in causes(error):
        failures = list((getattr(each, "worker_failures", None) or {}).values())
        if failures:
            candidates = [_root_cause(failure) for failure in failures]
            return min(candidates, key=lambda cause: (not isinstance(cause, CORRECTABLE), _is_collateral(cause)))
        error = each
    return error


def _is_collateral(error: BaseException) -> bool:
    """Return whether the error is a broken connection, the consequence of another worker's end."""
    return type(error).__name__.startswith("Dist") or "gloo" in str(error).lower() or "nccl" in str(error).lower()


def _summarize(error: BaseException) -> str:
    """Return the exception's type and the first line of its message."""
    line = next((line.strip() for line in redact(str(error)).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__
