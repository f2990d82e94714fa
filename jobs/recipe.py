"""The whole recipe as one Ray job: mine, fine-tune, mine with the new model, fine-tune that, mix it with the model that
all began with, measure before and after.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/recipe.py \\
        --model_name_or_path BAAI/bge-base-en-v1.5 --output_dir /shared/runs/recipe \\
        --train_data /shared/train.jsonl --corpus_data /shared/corpus.jsonl --query_data /shared/dev.jsonl

What each stage does stands below; change it there. Stages that are finished are skipped: the same command goes on where
it was stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybge.cli import run as cli
from raybge.cli.console import Console
from raybge.cli.options import EvaluateOptions, MineOptions, RecipeOptions, TrainOptions
from raybge.cli.parser import build
from raybge.cluster.resources import connect
from raybge.evaluation.run import evaluate
from raybge.merging.run import merge
from raybge.merging.spec import MergeOptions
from raybge.mining.run import mine
from raybge.training.run import train
from raybge.util.errors import UserError

ROUNDS = 2
MINING = {"range_for_sampling": "2-100", "negative_number": 7}
TRAINING = {
    "train_group_size": 8,
    "global_batch_size": 256,  # the objective is the same on any number of workers
    "sub_batch_size": 256,  # and fits their memory
    "learning_rate": 1e-5,
    "num_train_epochs": 1,
    "warmup_ratio": 0.1,
    "temperature": 0.02,
    "query_max_len": 64,
    "passage_max_len": 256,
    "bf16": True,  # where there is a GPU
}
MIXING = {"model_type": "encoder", "weights": [0.5, 0.5]}  # half of what was learned, half of what was known
METRICS = ("nDCG@10", "MRR@10", "Recall@100")


@dataclass(frozen=True)
class Stage:
    """A command and its flags, all but those that say which machines do the work; merging takes none of these."""

    name: str
    command: Callable[[Any, Console], Any]
    arguments: type
    flags: dict[str, Any]


def chain(given: RecipeOptions) -> list[Stage]:
    """The stages, in their order."""
    folder = os.path.abspath(given.output_dir)
    work = given.storage_path or f"{folder}/work"

    def measured(name: str, model: str) -> Stage:
        flags = dict(encoder=model, corpus_data=given.corpus_data, query_data=given.query_data, storage_path=work)
        return Stage(name, evaluate, EvaluateOptions, dict(**flags, metrics_file=f"{folder}/{name}.json"))

    model = given.model_name_or_path
    stages = [measured("before", model)]
    for i in range(1, ROUNDS + 1):
        mined, trained = f"{folder}/mined-{i}.jsonl", f"{folder}/model-{i}"
        mining = dict(input_file=given.train_data, corpus_data=given.corpus_data, output_file=mined, seed=given.seed)
        training = dict(train_data=mined, output_dir=trained, seed=given.seed, resume=True)
        mining |= dict(model_name_or_path=model, storage_path=work, **MINING)
        training |= dict(model_name_or_path=model, **TRAINING)
        stages += [
            Stage(f"mine-{i}", mine, MineOptions, mining),
            Stage(f"train-{i}", train, TrainOptions, training),
        ]
        model = trained
    mixed = f"{folder}/model"
    mixing = dict(model_names_or_paths=[model, given.model_name_or_path], output_path=mixed, overwrite=True, **MIXING)
    return [*stages, Stage("merge", merge, MergeOptions, mixing), measured("after", mixed)]


def recipe(given: RecipeOptions, console: Console) -> None:
    """Run the stages that are not finished, then compare."""
    folder = Path(os.path.abspath(given.output_dir))
    scale = {
        name: getattr(given, name)
        for name in ("num_workers", "use_gpu", "cpus_per_worker", "address", "on_bad_rows", "verbose")
    }
    stages = chain(given)
    # how often training starts again is no part of what a stage makes, so it may change from call to call
    restarts = {TrainOptions: {"max_failures": given.max_failures}}
    # everything that is wrong with the flags is said before the first stage
    alone = {"verbose": given.verbose}  # mixing by given weights needs no cluster
    where = [alone if stage.name == "merge" else {**scale, **restarts.get(stage.arguments, {})} for stage in stages]
    built = [build(stage.arguments, {**stage.flags, **own}) for stage, own in zip(stages, where, strict=True)]
    finished = Finished(folder / "stages.json")
    open_stages = [finished.check(stage) for stage in stages]
    for stage, is_open in zip(stages, open_stages, strict=True):
        console.info(f"{stage.name:<8} {'to do' if is_open else 'finished'}")
    if given.dry_run:
        return
    if any(open_stages):
        with connect(given.address, given.verbose):
            for stage, arguments, is_open in zip(stages, built, open_stages, strict=True):
                if is_open:
                    console.info(f"\n== {stage.name}")
                    stage.command(arguments, console)
                    finished.add(stage)
    _compare(folder, console)


class Finished:
    """The finished stages and their flags, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._flags: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def check(self, stage: Stage) -> bool:
        """Whether the stage is still to do. UserError where it was done with other flags."""
        before = self._flags.get(stage.name)
        for name in sorted({*(before or {}), *stage.flags}) if before else ():
            was, now = before.get(name), stage.flags.get(name)
            if was != now:
                raise UserError(
                    f"--output_dir: stage {stage.name} was run there with {name} {was}, now it is {now}: choose "
                    f"another folder, or take the stage and those after it out of {self._path}"
                )
        return before is None

    def add(self, stage: Stage) -> None:
        self._flags[stage.name] = stage.flags
        aside = self._path.with_suffix(".part")
        aside.write_text(json.dumps(self._flags, indent=2) + "\n")
        aside.replace(self._path)


def _compare(folder: Path, console: Console) -> None:
    before, after = (json.loads((folder / f"{name}.json").read_text()) for name in ("before", "after"))
    console.info("")
    console.table(("", "before", "after"), [(m, f"{before[m]:.4f}", f"{after[m]:.4f}") for m in METRICS])
    console.info(f"model: {folder / 'model'}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(RecipeOptions, recipe, "recipe", argv, prog="python jobs/recipe.py")


if __name__ == "__main__":
    raise SystemExit(main())
