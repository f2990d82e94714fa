"""Search with Ray Tune: it samples hyperparameters, starts trials and stops those that are unlikely to become best."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raybge.cluster.placement_groups import release_placement_group
from raybge.cluster.resources import head_address
from raybge.compat.ray import keys_out_of_trials
from raybge.tuning.population import pbt_scheduler, read_history, trial_resources
from raybge.tuning.records import Trial, best_trial
from raybge.tuning.spec import SearchAlgorithmSpec
from raybge.tuning.trial import EVALUATED, MINED, MODEL, PERCENT, read_curve, read_result, run_trial
from raybge.tuning.trial_spec import EVALUATIONS, TrialSpec

NAME = "search"
MAX_FAILURES = 1  # restarts of a trial that fails
NOT_RUNNING = ("TERMINATED", "ERROR", "PAUSED")  # Ray Tune's states in which a trial has no run
STATUS = {"TERMINATED": "stopped", "ERROR": "failed"}
REDUCTION = 3  # one of so many trials passes a rung of successive halving


@dataclass
class RayTuneSearch:
    """A search with Ray Tune.

    Args:
        spec: sampling, comparison and early stopping of trials.
        trial_spec: configuration of all trials.
        folder: folder of the state that Ray Tune needs to continue.
        on_change: called with all trials whenever one has begun, was evaluated or has ended.
        trials: records of the trials so far.
        ended: identifiers of trials that Ray Tune has ended, some before their state changes.
    """

    spec: SearchAlgorithmSpec
    trial_spec: TrialSpec
    folder: Path
    on_change: Callable[[list[Trial]], None]
    trials: list[Trial] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)

    def run(self) -> list[Trial]:
        """Run the search to its end, or continue it, and return all trials in the order of their samples."""
        from ray import tune

        os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
        # State is saved after each change: what it lacks is repeated when the search is continued.
        os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "0")
        trainable = tune.with_parameters(run_trial, trial_spec=self.trial_spec)
        # A trial's actor only waits for its training workers, and must take no CPU from them. Ray does not create a
        # placement group without resources, hence one byte of memory.
        pauses = self.trial_spec.pauses
        resources = trial_resources(self.trial_spec.runs, head_address()) if pauses else {"memory": 1}
        trainable = tune.with_resources(trainable, tune.PlacementGroupFactory([resources]))
        space = {name: domain.to_ray() for name, domain in self.spec.space.items()}
        state = str(self.folder / NAME)
        _RUNNING[:] = [self]
        try:
            if tune.Tuner.can_restore(state):
                tuner = tune.Tuner.restore(state, trainable, param_space=space)
            else:
                tuner = tune.Tuner(
                    trainable, param_space=space, tune_config=self._tune_config(), run_config=self._run_config()
                )
            with keys_out_of_trials(), _seeded(self.spec.seed):
                tuner.fit()
        finally:
            _RUNNING.clear()
        return self.trials

    def _tune_config(self) -> Any:
        from ray import tune

        spec = self.spec
        return tune.TuneConfig(
            metric=spec.metric,
            mode=spec.mode,
            search_alg=self._search_algorithm(),
            scheduler=self._scheduler(),
            num_samples=spec.num_samples,
            max_concurrent_trials=None if spec.algorithm == "random" else self.trial_spec.runs,
            time_budget_s=spec.time_budget,
        )

    def _run_config(self) -> Any:
        from ray import tune

        return tune.RunConfig(
            name=NAME,
            storage_path=str(self.folder),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[_trial_callback()],
            verbose=0,
        )

    def _search_algorithm(self) -> Any:
        algorithm, seed = self.spec.algorithm, self.spec.seed
        if algorithm == "bohb":
            from ray.tune.search.bohb import TuneBOHB

            return TuneBOHB(seed=seed)
        if algorithm == "hyperopt":
            from ray.tune.search.hyperopt import HyperOptSearch

            return HyperOptSearch(random_state_seed=seed)
        if algorithm == "random":
            from ray.tune.search.basic_variant import BasicVariantGenerator

            # It observes only a limit of its own. A population is sampled at once, and limited by its resources.
            limit = 0 if self.trial_spec.pauses else self.trial_spec.runs
            return BasicVariantGenerator(max_concurrent=limit, random_state=seed)
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=seed)

    def _scheduler(self) -> Any:
        from ray.tune import schedulers

        if self.spec.algorithm == "bohb":  # counted in evaluations, halving starts at the first one
            return schedulers.HyperBandForBOHB(
                time_attr=EVALUATED, max_t=EVALUATIONS, reduction_factor=REDUCTION, stop_last_trials=False
            )
        if self.spec.scheduler == "pbt":
            return pbt_scheduler(self.spec.space, PERCENT)
        first_evaluation = 100 / EVALUATIONS
        if self.spec.scheduler == "asha":
            return schedulers.ASHAScheduler(
                time_attr=PERCENT,
                max_t=100,
                grace_period=first_evaluation,
                reduction_factor=REDUCTION,
                stop_last_trials=False,  # a trial's last report comes after its end
            )
        if self.spec.scheduler == "median":
            return schedulers.MedianStoppingRule(time_attr=PERCENT, grace_period=first_evaluation)
        return schedulers.FIFOScheduler()

    def update(self, ray_trials: Sequence[Any]) -> None:
        """Record Ray Tune's trials after a change, and release what ended ones hold."""
        self.trials = [self._record(number, each) for number, each in enumerate(ray_trials, start=1)]
        for each, trial in zip(ray_trials, self.trials, strict=True):
            if each.status in NOT_RUNNING or trial.status != "running":
                release_placement_group(self.trial_spec.trial_folder(trial.id) / MODEL)
        self._delete_models()  # only now: the placement group of a trial is recorded next to its model
        self.on_change(self.trials)

    def _record(self, number: int, ray_trial: Any) -> Trial:
        folder = self.trial_spec.trial_folder(ray_trial.trial_id)
        result, curve = read_result(folder), read_curve(folder)
        status = STATUS.get(ray_trial.status, "stopped" if ray_trial.trial_id in self.ended else "running")
        status = "finished" if result else status
        flags = {name: ray_trial.config[name] for name in self.spec.space}
        error = None
        if status == "failed":
            error = (str(ray_trial.get_error() or "").strip().splitlines() or ["unknown"])[-1]
        seconds = result["seconds"] if result else round((ray_trial.last_result or {}).get("time_total_s", 0.0), 3)
        return Trial(
            number=number,
            flags=flags,
            status=status,
            curve=[(step, metrics[self.spec.metric]) for step, metrics in curve],
            metrics=curve[-1][1] if curve else {},
            seconds=seconds,
            error=error,
            id=ray_trial.trial_id,
            history=(self.trial_spec.pauses and read_history(folder)) or [(0, flags)],
        )

    def _delete_models(self) -> None:
        """Delete the models and the mined data of ended trials other than the best."""
        best = best_trial(self.trials, self.spec.metric, self.spec.mode)
        for trial in self.trials:
            if trial is not best and trial.status != "running":
                folder = self.trial_spec.trial_folder(trial.id)
                shutil.rmtree(folder / MODEL, ignore_errors=True)
                (folder / MINED).unlink(missing_ok=True)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python's and numpy's global generators, which Ray Tune's PBT samples from, and restore them afterwards."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


# The search of this process: Ray Tune pickles its callbacks, and a console cannot be pickled.
_RUNNING: list[RayTuneSearch] = []


def _trial_callback() -> Any:
    from ray import tune

    class TrialCallback(tune.Callback):
        """Update the running search whenever a trial has changed."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _update(trials)

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            _update(trials)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _update(trials, trial.trial_id)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _update(trials)

        def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
            _update(trials)

    return TrialCallback()


def _update(ray_trials: list[Any], ended: str | None = None) -> None:
    for search in _RUNNING:
        search.ended |= {ended} if ended else set()
        search.update(ray_trials)
