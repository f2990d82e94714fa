"""One trial: a training run inside a Ray Tune actor, and the folder in which it keeps what it finds.

trials/ID/curve.jsonl   a line for each evaluation, from the first on
trials/ID/result.json   of a trial that ran to its end
trials/ID/mined.jsonl   what it was trained on, where each trial mines its own
trials/ID/model         its model, as long as no other trial's is better
trials/ID/attempts/N    checkpoints to go on from, and what the trial was then: where trials pause
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import MineOptions, TrainOptions
from raybge.cli.parser import build, declared
from raybge.cluster.placement_groups import release
from raybge.cluster.remote_calls import unwrapped
from raybge.training.checkpoint.manifest import digest
from raybge.tuning.population import Attempt

CURVE, RESULT, MODEL, MINED = "curve.jsonl", "result.json", "model", "mined.jsonl"
BEFORE, TOKENS = "before.json", "tokens"
STEP, PERCENT, EVALUATED = "step", "percent", "evaluated"  # of a report to Ray Tune: updates, their share of all, and
EVALUATIONS = 8  # that share in evaluations, of which a trial has so many where nothing else is said
# Searched flags on which neither a batch depends nor what the model measures before training: of trials that differ in
# these alone, the first does for all what comes before the first update.
OPTIMISING = {
    *("learning_rate", "temperature", "weight_decay", "max_grad_norm", "optim", "optim_args"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "warmup_ratio", "warmup_steps"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "use_inbatch_neg", "negatives_cross_device", "kd_loss_type"),
}


@dataclass(frozen=True)
class Task:
    """What all trials have in common.

    Args:
        flags: of the training run, but for those that are searched and its folder.
        folder: where each trial has a folder of its own; one that all nodes share.
        runs: trials at a time.
        shared: folder for what trials have in common.
        mining: flags of raybge.mine, where each trial mines its negatives first.
        pauses: whether trials may be made to wait, and go on from a checkpoint.
    """

    flags: Mapping[str, Any]
    folder: str
    runs: int
    shared: str
    mining: Mapping[str, Any] | None = None
    pauses: bool = False

    def place(self, trial_id: str) -> Path:
        """A trial's folder."""
        return Path(self.folder) / trial_id

    def common(self, drawn: Mapping[str, Any]) -> Path:
        """A folder of what this trial shares with others: tokens, and what the model measures before training."""
        about = {name: value for name, value in drawn.items() if name not in OPTIMISING}
        return Path(self.shared) / digest(about)

    def stages(
        self, drawn: Mapping[str, Any], mined: str, output_dir: str
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """A trial's flags of raybge.mine, None where nothing is mined, and of raybge.train."""
        trained = declared(TrainOptions)
        training = {**self.flags, **{name: value for name, value in drawn.items() if name in trained}}
        training["output_dir"] = output_dir
        if self.mining is None:
            return None, training
        mining = {**self.mining, **{name: value for name, value in drawn.items() if name not in trained}}
        mining |= {"input_file": training["train_data"], "output_file": mined}
        return mining, {**training, "train_data": [mined]}


def run_trial(config: dict[str, Any], task: Task) -> None:
    """What Ray Tune calls, in an actor: train, and report each evaluation as it comes."""
    from ray import tune

    from raybge.training.run import train
    from raybge.training.worker_config import TrialContext

    folder = task.place(tune.get_context().get_trial_id())
    if known := result_of(folder):  # it had ended when the search was killed
        step, metrics = known["curve"][-1]
        tune.report(_report(step, step, metrics))
        return
    folder.mkdir(parents=True, exist_ok=True)
    attempt = Attempt.begin(folder, config, tune.get_checkpoint()) if task.pauses else None
    _cut_curve(folder, attempt.step if attempt else 0)
    common = task.common(config)

    def measured(step: int, total: int, metrics: dict[str, float]) -> bool:
        between = 0 < step < total  # the last is reported when the model is there
        if attempt and between and not attempt.has(step):
            return False
        with open(folder / CURVE, "a") as curve:
            curve.write(json.dumps([step, metrics]) + "\n")
        if step == 0:
            _write_json(common / BEFORE, metrics)
        if between:
            checkpoint = attempt.pointer(step) if attempt else None
            tune.report(_report(step, total, metrics), checkpoint=checkpoint)
        return True

    context = TrialContext(measured, task.runs, str(common / TOKENS), _read_json(common / BEFORE))
    start = time.monotonic()
    mining, training = task.stages(config, str(folder / MINED), str(folder / MODEL))
    if mining:
        _mine(mining)
    release(folder / MODEL)  # of an attempt before, which may have been stopped a moment ago
    shutil.rmtree(folder / MODEL, ignore_errors=True)
    train(build(TrainOptions, {**training, **(attempt.flags() if attempt else {})}), Console(), context)
    curve = curve_of(folder)
    _write_json(folder / RESULT, {"curve": curve, "seconds": round(time.monotonic() - start, 3)})
    step, metrics = curve[-1]
    tune.report(_report(step, step, metrics))


def _mine(flags: dict[str, Any]) -> None:
    """In a task of no placement group: what a trial starts itself would have to find room in the trial's own."""
    import ray

    from raybge.mining.run import mine

    def run() -> None:
        mine(build(MineOptions, flags), Console())

    with unwrapped():
        ray.get(ray.remote(run).options(num_cpus=0, scheduling_strategy="DEFAULT").remote())


def result_of(folder: Path) -> dict[str, Any] | None:
    """`curve` and `seconds` of a trial that ran to its end."""
    return _read_json(folder / RESULT)


def curve_of(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of each evaluation so far, that of the model before training among them."""
    path = folder / CURVE
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [(step, metrics) for step, metrics in map(json.loads, (line for line in lines if line.endswith("\n")))]


def _report(step: int, total: int, metrics: Mapping[str, float]) -> dict[str, float]:
    return {**metrics, STEP: step, PERCENT: 100 * step / total, EVALUATED: EVALUATIONS * step / total}


def _cut_curve(folder: Path, step: int) -> None:
    """Forget what was measured after a step from which the trial goes on; 0: it starts anew."""
    kept = [[at, metrics] for at, metrics in curve_of(folder) if at <= step and step]
    (folder / CURVE).write_text("".join(json.dumps(each) + "\n" for each in kept))


def _read_json(path: Path) -> Any:
    """What is in a file; None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    aside.write_text(json.dumps(value))
    aside.rename(path)
