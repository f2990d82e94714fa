"""Trial of a search: a training run inside a Ray Tune actor, and the folder with its results.

trials/ID/curve.jsonl   one line per evaluation, in order
trials/ID/result.json   only of a trial that ran to its end
trials/ID/mined.jsonl   training data, if each trial mines its own
trials/ID/model         its model, as long as no other trial's is better
trials/ID/attempts/N    checkpoints to continue from and their hyperparameters, if trials pause
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import MineOptions, TrainOptions
from raybge.cli.parser import build_options
from raybge.cluster.placement_groups import release_placement_group
from raybge.cluster.remote_calls import unwrap_user_errors
from raybge.tuning.population import TrialAttempt
from raybge.tuning.trial_spec import EVALUATIONS, TrialSpec
from raybge.util.atomic_write import atomic_stream
from raybge.util.filesystem import filesystem

CURVE, RESULT, MODEL, MINED = "curve.jsonl", "result.json", "model", "mined.jsonl"
INITIAL_METRICS, TOKENS = "before.json", "tokens"
# Keys of a report to Ray Tune: updates, their share of the run in percent, and that share in evaluations.
STEP, PERCENT, EVALUATED = "step", "percent", "evaluated"


def run_trial(config: dict[str, Any], trial_spec: TrialSpec) -> None:
    """Train in a Ray Tune actor and report each evaluation.

    Args:
        config: sampled value of each searched flag.
        trial_spec: configuration of all trials.
    """
    from ray import tune

    from raybge.training.run import train
    from raybge.training.worker_config import TrialContext

    folder = trial_spec.trial_folder(tune.get_context().get_trial_id())
    if result := read_result(folder):  # it ended before the search was killed
        step, metrics = result["curve"][-1]
        tune.report(_report(step, step, metrics))
        return
    folder.mkdir(parents=True, exist_ok=True)
    attempt = TrialAttempt.begin(folder, config, tune.get_checkpoint()) if trial_spec.pauses else None
    _truncate_curve(folder, attempt.step if attempt else 0)
    shared = trial_spec.shared_folder(config)
    context = TrialContext(
        _evaluation_callback(folder, shared, attempt),
        trial_spec.runs,
        str(shared / TOKENS),
        _read_json(shared / INITIAL_METRICS),
    )
    start = time.monotonic()
    mining, training = trial_spec.stage_flags(config, str(folder / MINED), str(folder / MODEL))
    if mining:
        _mine(mining)
    release_placement_group(folder / MODEL)  # of an earlier attempt, which may have been stopped just now
    shutil.rmtree(folder / MODEL, ignore_errors=True)
    train(
        build_options(TrainOptions, {**training, **(attempt.flags() if attempt else {})}),
        Console(shows_messages=True),
        context,
    )
    curve = read_curve(folder)
    _write_json(folder / RESULT, {"curve": curve, "seconds": round(time.monotonic() - start, 3)})
    step, metrics = curve[-1]
    tune.report(_report(step, step, metrics))


def _evaluation_callback(
    folder: Path, shared: Path, attempt: TrialAttempt | None
) -> Callable[[int, int, dict[str, float]], bool]:
    """Return the function that records and reports an evaluation.

    It returns False if the evaluation must be repeated later, because its checkpoint is not complete.
    """
    from ray import tune

    def on_evaluation(step: int, total: int, metrics: dict[str, float]) -> bool:
        intermediate = 0 < step < total  # the last one is reported once the model is written
        if attempt and intermediate and not attempt.has_checkpoint(step):
            return False
        with open(folder / CURVE, "a") as curve:
            curve.write(json.dumps([step, metrics]) + "\n")
        if step == 0:
            _write_json(shared / INITIAL_METRICS, metrics)
        if intermediate:
            checkpoint = attempt.pointer(step) if attempt else None
            tune.report(_report(step, total, metrics), checkpoint=checkpoint)
        return True

    return on_evaluation


def _mine(flags: dict[str, Any]) -> None:
    """Mine in a task without placement group: inside the trial's own, mining would find no free resources."""
    import ray

    from raybge.mining.run import mine

    def run() -> None:
        mine(build_options(MineOptions, flags), Console())

    with unwrap_user_errors():
        ray.get(ray.remote(run).options(num_cpus=0, scheduling_strategy="DEFAULT").remote())


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return `curve` and `seconds` of a trial that ran to its end; None for any other trial."""
    return _read_json(folder / RESULT)


def read_curve(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Return (step, metrics) of each evaluation so far; step 0 is the evaluation before training."""
    path = folder / CURVE
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [(step, metrics) for step, metrics in map(json.loads, (line for line in lines if line.endswith("\n")))]


def _report(step: int, total: int, metrics: Mapping[str, float]) -> dict[str, float]:
    return {**metrics, STEP: step, PERCENT: 100 * step / total, EVALUATED: EVALUATIONS * step / total}


def _truncate_curve(folder: Path, step: int) -> None:
    """Remove the evaluations after the step from which the trial continues; all of them for step 0."""
    remaining = [[at, metrics] for at, metrics in read_curve(folder) if at <= step and step]
    (folder / CURVE).write_text("".join(json.dumps(each) + "\n" for each in remaining))


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _write_json(path: Path, value: Any) -> None:
    with atomic_stream(*filesystem(str(path))) as out:
        out.write(json.dumps(value).encode())
