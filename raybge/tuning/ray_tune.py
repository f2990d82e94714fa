"""The search itself: Ray Tune draws flags, starts trials and ends those that promise little."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raybge.cli.options import TuneOptions
from raybge.cluster.placement_groups import release
from raybge.cluster.resources import head_address
from raybge.tuning import population
from raybge.tuning.records import Trial, best
from raybge.tuning.search_space import Domain
from raybge.tuning.trial import EVALUATED, EVALUATIONS, MINED, MODEL, PERCENT, Task, curve_of, result_of, run_trial
from raybge.util.errors import UserError

NAME = "search"
ATTEMPTS = 1  # more after the first of a trial that fails
ENDED = ("TERMINATED", "ERROR", "PAUSED")  # and no run goes on
STATUS = {"TERMINATED": "stopped", "ERROR": "failed"}
PACKAGES = {"hyperopt": ("hyperopt",), "bohb": ("hpbandster", "ConfigSpace")}
REDUCTION = 3  # of trials that come to a rung of successive halving, one in so many goes on


@dataclass
class Search:
    """A search with Ray Tune.

    Args:
        arguments: what to compare by, and how to draw and to stop.
        space: the domain of each searched flag.
        task: what the trials have in common.
        folder: where Ray Tune keeps what it needs to continue.
        on_change: called with all trials whenever one has begun, was measured, or has ended.
    """

    arguments: TuneOptions
    space: Mapping[str, Domain]
    task: Task
    folder: Path
    on_change: Any
    trials: list[Trial] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)  # trials that Ray Tune has ended, before it says so in their status

    def run(self) -> list[Trial]:
        """Run, or continue, to the end; all trials in the order in which they were drawn."""
        from ray import tune
        from ray.tune.execution import class_cache

        os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
        # Written after each change: what is not there is done again when a search is continued.
        os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "0")
        # Ray Tune would hand them to trials in a way that Ray logs; a node has its own, as for any other command.
        class_cache.ENV_VARS_TO_PROPAGATE.difference_update(
            name for name in list(class_cache.ENV_VARS_TO_PROPAGATE) if name.startswith("AWS_")
        )
        trainable = tune.with_parameters(run_trial, task=self.task)
        # A trial's actor only waits for its training workers. It takes no CPU from them; of nothing Ray makes no group.
        needs = population.resources(self.task.runs, head_address()) if self.task.pauses else {"memory": 1}
        trainable = tune.with_resources(trainable, tune.PlacementGroupFactory([needs]))
        space = {name: domain.to_ray() for name, domain in self.space.items()}
        place = self.folder / NAME
        _RUNNING[:] = [self]
        try:
            if tune.Tuner.can_restore(str(place)):
                tuner = tune.Tuner.restore(str(place), trainable, param_space=space)
            else:
                tuner = tune.Tuner(
                    trainable, param_space=space, tune_config=self._tune_config(), run_config=self._run_config()
                )
            with _seeded(self.seed):
                tuner.fit()
        finally:
            _RUNNING.clear()
        return self.trials

    @property
    def seed(self) -> int:
        return int(self.arguments.training.get("seed", 42))

    def _tune_config(self) -> Any:
        from ray import tune

        asked = self.arguments
        return tune.TuneConfig(
            metric=asked.metric,
            mode=asked.mode,
            search_alg=self._searcher(),
            scheduler=self._scheduler(),
            num_samples=asked.num_samples,
            max_concurrent_trials=None if self._alg == "random" else self.task.runs,
            time_budget_s=asked.time_budget,
        )

    def _run_config(self) -> Any:
        from ray import tune

        return tune.RunConfig(
            name=NAME,
            storage_path=str(self.folder),
            failure_config=tune.FailureConfig(max_failures=ATTEMPTS),
            callbacks=[_watch()],
            verbose=0,
        )

    @property
    def _alg(self) -> str:
        return algorithm(self.arguments, self.space)

    def _searcher(self) -> Any:
        if self._alg == "bohb":
            from ray.tune.search.bohb import TuneBOHB

            return TuneBOHB(seed=self.seed)
        if self._alg == "hyperopt":
            from ray.tune.search.hyperopt import HyperOptSearch

            return HyperOptSearch(random_state_seed=self.seed)
        if self._alg == "random":
            from ray.tune.search.basic_variant import BasicVariantGenerator

            # It keeps to a limit of its own alone. A population is drawn at once, and `needs` limits it.
            limit = 0 if self.task.pauses else self.task.runs
            return BasicVariantGenerator(max_concurrent=limit, random_state=self.seed)
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=self.seed)

    def _scheduler(self) -> Any:
        from ray.tune import schedulers

        if self._alg == "bohb":  # in the time that it counts in, halving starts at the first evaluation
            return schedulers.HyperBandForBOHB(
                time_attr=EVALUATED, max_t=EVALUATIONS, reduction_factor=REDUCTION, stop_last_trials=False
            )
        if self.arguments.scheduler == "pbt":
            return population.scheduler(self.space, PERCENT)
        first = 100 / EVALUATIONS
        if self.arguments.scheduler == "asha":
            return schedulers.ASHAScheduler(
                time_attr=PERCENT,
                max_t=100,
                grace_period=first,
                reduction_factor=REDUCTION,
                stop_last_trials=False,  # the last report of a trial comes when it is over
            )
        if self.arguments.scheduler == "median":
            return schedulers.MedianStoppingRule(time_attr=PERCENT, grace_period=first)
        return schedulers.FIFOScheduler()

    def changed(self, known: Sequence[Any]) -> None:
        """Ray Tune's trials are not what they were."""
        self.trials = [self._record(number, each) for number, each in enumerate(known, start=1)]
        for each, trial in zip(known, self.trials, strict=True):
            if each.status in ENDED or trial.status != "running":
                release(self.task.place(trial.id) / MODEL)
        self._forget_models()  # only now: what a trial held is noted beside its model
        self.on_change(self.trials)

    def _record(self, number: int, known: Any) -> Trial:
        folder = self.task.place(known.trial_id)
        result, curve = result_of(folder), curve_of(folder)
        status = STATUS.get(known.status, "stopped" if known.trial_id in self.ended else "running")
        status = "finished" if result else status
        flags = {name: known.config[name] for name in self.space}
        error = None
        if status == "failed":
            error = (str(known.get_error() or "").strip().splitlines() or ["unknown"])[-1]
        return Trial(
            number=number,
            flags=flags,
            status=status,
            curve=[(step, metrics[self.arguments.metric]) for step, metrics in curve],
            metrics=curve[-1][1] if curve else {},
            seconds=result["seconds"] if result else round((known.last_result or {}).get("time_total_s", 0.0), 3),
            error=error,
            id=known.trial_id,
            history=(self.task.pauses and population.history(folder)) or [(0, flags)],
        )

    def _forget_models(self) -> None:
        """Delete the models of trials that are not the best, and what they mined."""
        kept = best(self.trials, self.arguments.metric, self.arguments.mode)
        for trial in self.trials:
            if trial is not kept and trial.status != "running":
                shutil.rmtree(self.task.place(trial.id) / MODEL, ignore_errors=True)
                (self.task.place(trial.id) / MINED).unlink(missing_ok=True)


def algorithm(arguments: TuneOptions, space: Mapping[str, Domain]) -> str:
    """Who draws the values: Optuna, unless a grid is to be gone through or values change while trials train.

    UserError where who is asked for cannot do it.
    """
    grids = [name for name, domain in space.items() if domain.grid]
    asked = arguments.search_alg or ("random" if grids or arguments.scheduler == "pbt" else "optuna")
    if asked == "random":
        return asked
    if arguments.scheduler == "pbt":
        raise UserError(f"--search_alg {asked} learns from whole trials; --scheduler pbt changes them while they train")
    if grids:
        raise UserError(
            f"--search_alg {asked} draws values and goes through no grid: search {grids[0]} with choice(...)"
        )
    if asked == "bohb" and arguments.scheduler != "asha":
        raise UserError(f"--scheduler {arguments.scheduler}: --search_alg bohb has its own way to stop trials early")
    if lacking := [name for name in PACKAGES.get(asked, ()) if importlib.util.find_spec(name) is None]:
        raise UserError(f"--search_alg {asked} needs a package that is not here: pip install {' '.join(lacking)}")
    return asked


def pauses(arguments: TuneOptions) -> bool:
    """Whether trials are made to wait, and go on from a checkpoint."""
    return arguments.scheduler == "pbt" or arguments.search_alg == "bohb"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Ray Tune's population based training draws from Python's and numpy's global generators."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


# The search that this process runs: Ray Tune pickles its callbacks, and a console cannot be.
_RUNNING: list[Search] = []


def _watch() -> Any:
    from ray import tune

    class Watch(tune.Callback):
        """Tells the search whenever a trial has changed."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _tell(trials)

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            _tell(trials)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _tell(trials, trial.trial_id)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _tell(trials)

        def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
            _tell(trials)

    return Watch()


def _tell(trials: list[Any], ended: str | None = None) -> None:
    for search in _RUNNING:
        search.ended |= {ended} if ended else set()
        search.changed(trials)
