"""Running the training workers: start them through Ray Train, show how far they are, start them again when one is lost.

Restarts are counted here and not by Ray Train's FailureConfig. What a person has to mend is then never tried again, the
console says where a restart continues, and Ctrl-C ends the run after the step that it is in (see interruption.py).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.cluster.placement_groups import release
from raybge.training.checkpoint.manifest import load, name_of, newest
from raybge.training.health.heartbeat import StallError
from raybge.training.signals import Interruption
from raybge.util.errors import UserError, causes
from raybge.util.redaction import public

if TYPE_CHECKING:
    from raybge.cli.console import Console
    from raybge.cluster.resources import Plan
    from raybge.training.elastic import Elastic
    from raybge.training.health.run_state import Progress
    from raybge.training.worker_config import OnMeasured, WorkerConfig

POLL_SECONDS = 0.2
# Seconds that Ray Train waits for a worker to leave its process group when the run ends. One that waits there for a
# worker that failed will not; Ray's default of 30 would only delay the message.
LEAVE_SECONDS = "3"
# Ray Train asks its workers so often how they are. A checkpoint waits until the one before is heard of, and the end of
# a run until its last is; Ray's default of 2 s only pays with so many workers that asking is work.
ASKING_SECONDS, ASKED_A_SECOND = 0.5, 256


@dataclass
class Launch:
    """A training run.

    Args:
        config: what each worker is told.
        plan: how many workers, and what each holds.
        group: arguments of Ray Train's TorchConfig.
        storage: where checkpoints lie.
        folder: where Ray Train keeps its own notes.
        max_failures: restarts after a failure, -1 for no limit.
        on_measured: called in this thread.
        elastic: where the workers come and go with the cluster.
    """

    config: WorkerConfig
    plan: Plan
    group: dict[str, Any]
    storage: str
    folder: Path
    max_failures: int = 0
    on_measured: OnMeasured | None = None
    elastic: Elastic | None = None
    told: int = 0  # evaluations that `on_measured` has heard of
    shown: int = 0  # lines of the workers that the person has read

    def watch(self, console: Console) -> dict[str, float]:
        """Run to the end and return the metrics. Raises what a worker raised when no restart is left."""
        board = self.config.board
        failures = 0
        with console.bar("train", None, self.config.learning.rows) as bar:
            saves = self.config.training.get("save_strategy") != "no"
            with Interruption(
                board, self.storage, saves, lambda line: bar.write(line, file=bar.fp), console.again
            ) as stop:
                while (error := self._attempt(bar, stop)) is not None:
                    cause = _cause(error)
                    workers = self._workers_after(cause, bar, stop)
                    failures += workers is None
                    if workers is None and (isinstance(cause, UserError) or not self._may_restart(failures)):
                        raise cause from error
                    self._prepare_restart(bar, error, failures, workers)
        return board.read().metrics

    def _workers_after(self, cause: BaseException, bar: Any, stop: Interruption) -> int | None:
        """Of the next start, where it is the cluster that ended the last; None where that was a failure."""
        if self.elastic is None or isinstance(cause, UserError):
            return None
        lost = type(cause).__module__.startswith("ray.") or _collateral(cause)  # not what the worker itself raised
        return self.elastic.settled(self.plan, lost, lambda line: bar.write(line, file=bar.fp), stop.end)

    def _prepare_restart(self, bar: Any, error: BaseException, failures: int, workers: int | None) -> None:
        """`workers`: of the next start, where the cluster has changed."""
        print(public("".join(traceback.format_exception(error))), file=sys.stderr)  # into the log
        if start := newest(self.storage):
            self.config = replace(self.config, resume_from=start.path)
        place = self.config.resume_from
        at = f"continues from {name_of(place)}" if place else "starts again from the beginning"
        limit = f" of {self.max_failures}" if self.max_failures > 0 else ""
        says = f"a worker failed ({_first_line(_cause(error))}): {at}, restart {failures}{limit}"
        if self.elastic and workers is not None:
            before = self.plan.workers
            self.config, self.plan = self.elastic.resized(self.config, self.plan, workers)
            now = replace(self.plan, range=None).describe("worker")
            says = f"the cluster has changed: {at} with {now}, {before} before"
        bar.write(says, file=bar.fp)

    def _may_restart(self, failures: int) -> bool:
        return self.max_failures == -1 or failures <= self.max_failures

    def _attempt(self, bar: Any, stop: Interruption) -> BaseException | None:
        """One start of the workers, watched from the main thread, where Ctrl-C is heard; the error that ended it."""
        outcome: list[BaseException] = []
        if self.elastic:
            self.elastic.begin()
        if self.config.row_log:
            start = self.config.resume_from and load(self.config.resume_from, "--storage_path")
            log = self.config.row_log.begin(start.step if start else 0, self.plan.workers)
            self.config = replace(self.config, row_log=log)
        release(self.config.output_dir)  # of an attempt before, which may have ended without
        self.config.board.clear()
        thread = threading.Thread(target=self._fit, args=(outcome,), daemon=True)
        stalled: str | None = None
        with self._ended_on_interrupt():
            thread.start()
            while thread.is_alive():
                thread.join(POLL_SECONDS)
                self._tell(bar)
                stop.heed()
                if stalled is None and (stalled := self._stalled()):
                    self._end_workers()
                if self.elastic:
                    self.elastic.watch(self.plan, self.config.board)
        self._tell(bar)
        error = StallError(stalled) if stalled else outcome[0] if outcome else None
        if stop.heard:
            if error:
                bar.write(f"a worker failed ({_first_line(_cause(error))})", file=bar.fp)
            raise stop.error()
        return error

    def _stalled(self) -> str | None:
        """Who keeps the other workers waiting for too long."""
        import ray

        if not self.config.stall_timeout:
            return None
        try:
            return self.config.board.stalled(self.config.stall_timeout)
        except ray.exceptions.RayError:
            return None

    def _tell(self, bar: Any) -> None:
        """Show how far the run is, and pass on what was measured since the last time."""
        import ray

        try:
            progress = self.config.board.read()
        except ray.exceptions.RayError:
            return  # the run ended and took Ray with it
        _show(progress, self.config, bar)
        for line in progress.said[self.shown :]:
            bar.write(line, file=bar.fp)
            self.shown += 1
        for step, metrics in progress.measured[self.told :]:
            if self.on_measured and not self.on_measured(step, progress.total, metrics):
                return
            self.told += 1

    @contextlib.contextmanager
    def _ended_on_interrupt(self) -> Iterator[None]:
        """End the workers when the block is left by an error: where Ray goes on without us, they would too."""
        try:
            yield
        except BaseException:
            self._end_workers()
            raise

    def _end_workers(self) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            self.config.board.end()

    def _fit(self, outcome: list[BaseException]) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        from raybge.cluster.placement_groups import trainer
        from raybge.cluster.process_group import NodeTorchConfig

        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", LEAVE_SECONDS)
        asking = max(ASKING_SECONDS, self.plan.workers / ASKED_A_SECOND)
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(asking))
        # an actor beside each run, to say that a node will be taken away: nobody here asks it
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        try:
            trainer()(
                _train_worker,
                train_loop_config={"worker": self.config},
                scaling_config=ScalingConfig(
                    num_workers=self.plan.workers,
                    use_gpu=bool(self.plan.gpus),
                    resources_per_worker={"CPU": self.plan.cpus, "GPU": self.plan.gpus},
                ),
                torch_config=NodeTorchConfig(**self.group),
                run_config=RunConfig(
                    name=uuid.uuid4().hex,  # Ray Train would continue a name that it knows
                    storage_path=str(self.folder),
                    failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
                ),
            ).fit()
        except BaseException as error:  # handed to the main thread
            outcome.append(error)


def _train_worker(settings: dict[str, WorkerConfig]) -> None:
    """What runs in each worker. Only there is transformers loaded: that takes seconds."""
    from raybge.training.worker import train_worker

    train_worker(settings)


def _show(progress: Progress, config: WorkerConfig, bar: Any) -> None:
    if not progress.total:
        return
    order, accumulated = config.order, config.identity.gradient_accumulation_steps

    def groups(updates: int) -> int:
        epochs, rest = divmod(updates, -(-order.steps // accumulated))
        return order.total * epochs + min(rest * accumulated * order.global_batch, order.total)

    bar.total = groups(progress.total)
    says = [] if progress.loss is None else [f"loss {progress.loss:.4f}"]
    says.append(f"step {progress.step:,}/{progress.total:,}")
    last = progress.measured[-1][1] if progress.measured else {}
    says += [f"{name} {value:.4f}" for name, value in last.items() if "nDCG" in name]
    bar.set_postfix_str(", ".join(says), refresh=False)
    bar.update(groups(progress.step) - bar.n)


def _cause(error: BaseException) -> BaseException:
    """The exception that a worker raised, out of what Ray Train and Ray wrap around it.

    Where several failed, the first failure makes others fail in their collectives: the one that a person can mend, or
    else one that is no torn connection, says more.
    """
    for each in causes(error):
        failures = list((getattr(each, "worker_failures", None) or {}).values())
        if failures:
            found = [_cause(failure) for failure in failures]
            return min(found, key=lambda cause: (not isinstance(cause, UserError), _collateral(cause)))
        error = each
    return error


def _collateral(error: BaseException) -> bool:
    """Whether another worker's end is what made this one fail."""
    return type(error).__name__.startswith("Dist") or "gloo" in str(error).lower() or "nccl" in str(error).lower()


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in public(str(error)).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__
