"""One trial: a training run inside a Ray Tune actor, and the folder in which it keeps what it finds.

trials/ID/curve.jsonl   a line for each evaluation, from the first on
trials/ID/result.json   of a trial that ran to its end
trials/ID/mined.jsonl   what it was trained on, where each trial mines its own
trials/ID/model         its model, as long as no other trial's is better
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybge.arguments import MineArguments, TrainArguments
from raybge.flags import build, declared
from raybge.screen import Screen

CURVE, RESULT, MODEL, MINED = "curve.jsonl", "result.json", "model", "mined.jsonl"
STEP, PERCENT = "step", "percent"  # of a report to Ray Tune: updates, and their share of all


@dataclass(frozen=True)
class Task:
    """What all trials have in common.

    Args:
        flags: of the training run, but for those that are searched and its folder.
        folder: where each trial has a folder of its own; one that all nodes share.
        runs: trials at a time.
        mining: flags of raybge.mine, where each trial mines its negatives first.
    """

    flags: Mapping[str, Any]
    folder: str
    runs: int
    mining: Mapping[str, Any] | None = None

    def place(self, trial_id: str) -> Path:
        """A trial's folder."""
        return Path(self.folder) / trial_id

    def stages(
        self, drawn: Mapping[str, Any], mined: str, output_dir: str
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """A trial's flags of raybge.mine, None where nothing is mined, and of raybge.train."""
        trained = declared(TrainArguments)
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

    from raybge.mine import mine
    from raybge.train import train

    folder = task.place(tune.get_context().get_trial_id())
    if known := result_of(folder):  # it had ended when the search was killed
        step, metrics = known["curve"][-1]
        tune.report({**metrics, STEP: step, PERCENT: 100.0})
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CURVE).write_text("")  # of an earlier attempt

    def measured(step: int, total: int, metrics: dict[str, float]) -> None:
        with open(folder / CURVE, "a") as curve:
            curve.write(json.dumps([step, metrics]) + "\n")
        if 0 < step < total:  # the last is reported when the model is there
            tune.report({**metrics, STEP: step, PERCENT: 100 * step / total})

    start = time.monotonic()
    mining, training = task.stages(config, str(folder / MINED), str(folder / MODEL))
    if mining:
        mine(build(MineArguments, mining), Screen())
    train(build(TrainArguments, {**training, "overwrite_output_dir": True}), Screen(), measured, task.runs)
    curve = curve_of(folder)
    found = {"curve": curve, "seconds": round(time.monotonic() - start, 3)}
    aside = folder / f"{RESULT}.tmp"
    aside.write_text(json.dumps(found))
    aside.rename(folder / RESULT)
    step, metrics = curve[-1]
    tune.report({**metrics, STEP: step, PERCENT: 100.0})


def result_of(folder: Path) -> dict[str, Any] | None:
    """`curve` and `seconds` of a trial that ran to its end."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.is_file() else None


def curve_of(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of each evaluation so far, that of the model before training among them."""
    path = folder / CURVE
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [(step, metrics) for step, metrics in map(json.loads, (line for line in lines if line.endswith("\n")))]
