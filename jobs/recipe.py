"""The whole recipe as one Ray job: mine, fine-tune, mine with the new model, fine-tune it, merge it with the base
model, evaluate before and after.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/recipe.py \\
        --model_name_or_path BAAI/bge-base-en-v1.5 --output_dir /shared/runs/recipe \\
        --train_data /shared/train.jsonl --corpus_data /shared/corpus.jsonl --query_data /shared/dev.jsonl

The constants below define the stages. Finished stages are skipped: the same command continues an interrupted run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import EvaluateOptions, MergeOptions, MineOptions, RecipeOptions, TrainOptions
from raybge.cli.parser import build_options
from raybge.cli.run import run_command
from raybge.cli.terminal import BOLD
from raybge.cluster.connection import connect
from raybge.data.groups import parse_group
from raybge.data.source_files import list_files
from raybge.data.survey import IN_PROCESS_BYTES, survey
from raybge.evaluation.run import evaluate
from raybge.merging.run import merge
from raybge.mining.run import mine
from raybge.training.run import train
from raybge.util.errors import UserError

ROUNDS = 2
UPDATES = 40  # of an epoch, at least
MINING = {"range_for_sampling": "2-100", "negative_number": 7}
TRAINING = {
    "train_group_size": 8,
    "global_batch_size": 256,  # at most, see `global_batch`; the objective is the same on any number of workers
    "sub_batch_size": 256,  # bounds the memory of each worker
    "learning_rate": 1e-5,
    "num_train_epochs": 1,
    "warmup_ratio": 0.1,
    "temperature": 0.02,
    "query_max_len": 64,
    "passage_max_len": 256,
    "bf16": True,  # on GPUs
}
MERGING = {"model_type": "encoder", "weights": [0.5, 0.5]}  # the fine-tuned model and the base model
METRICS = ("nDCG@10", "MRR@10", "Recall@100")


@dataclass(frozen=True)
class Stage:
    """A command and its flags, without the scale flags, which all stages but merging share."""

    name: str
    command: Callable[[Any, Console], Any]
    options_class: type
    flags: dict[str, Any]


def global_batch(options: RecipeOptions) -> int:
    """Return the groups of a step: of little data so many that an epoch has UPDATES, but at least 8."""
    largest: int = TRAINING["global_batch_size"]
    files = list_files(options.train_data, "--train_data", options.accept_any_text)
    if sum(file.size for file in files) > IN_PROCESS_BYTES:
        return largest
    rows = survey(files, IN_PROCESS_BYTES, parse_group, options.on_bad_rows).total_rows
    return min(largest, max(8, 1 << (rows // UPDATES).bit_length() - 1)) if rows >= UPDATES else 8


def chain(options: RecipeOptions) -> list[Stage]:
    """Return the stages in order."""
    folder = os.path.abspath(options.output_dir)
    work = options.storage_path or f"{folder}/work"

    def evaluation(name: str, model: str) -> Stage:
        flags = dict(
            model_name_or_path=model, corpus_data=options.corpus_data, query_data=options.query_data, storage_path=work
        )
        return Stage(name, evaluate, EvaluateOptions, dict(**flags, metrics_file=f"{folder}/{name}.json"))

    model = options.model_name_or_path
    batch = {"global_batch_size": global_batch(options)}
    stages = [evaluation("before", model)]
    for i in range(1, ROUNDS + 1):
        mined, trained = f"{folder}/mined-{i}.jsonl", f"{folder}/model-{i}"
        mining = dict(
            input_file=options.train_data, corpus_data=options.corpus_data, output_file=mined, seed=options.seed
        )
        training = dict(train_data=mined, output_dir=trained, seed=options.seed, resume=True)
        mining |= dict(model_name_or_path=model, seed=options.seed, storage_path=work, **MINING)
        training |= dict(model_name_or_path=model, **(TRAINING | batch))
        stages += [
            Stage(f"mine-{i}", mine, MineOptions, mining),
            Stage(f"train-{i}", train, TrainOptions, training),
        ]
        model = trained
    merged = f"{folder}/model"
    merging = dict(
        model_names_or_paths=[model, options.model_name_or_path], output_path=merged, overwrite=True, **MERGING
    )
    return [*stages, Stage("merge", merge, MergeOptions, merging), evaluation("after", merged)]


def recipe(options: RecipeOptions, console: Console) -> None:
    """Run the stages that are not finished, then compare the metrics."""
    folder = Path(os.path.abspath(options.output_dir))
    scale = {
        name: getattr(options, name)
        for name in (
            "num_workers",
            "use_gpu",
            "cpus_per_worker",
            "address",
            "on_bad_rows",
            "accept_any_text",
            "verbose",
        )
    }
    stages = chain(options)
    # The number of restarts does not change the result of a stage, so it may differ between calls.
    restarts = {TrainOptions: {"max_failures": options.max_failures}}
    # Invalid flags of any stage are reported before the first stage starts.
    no_cluster = {"verbose": options.verbose}  # merging with explicit weights needs none
    run_flags = [
        no_cluster if stage.name == "merge" else {**scale, **restarts.get(stage.options_class, {})} for stage in stages
    ]
    for stage, flags in zip(stages, run_flags, strict=True):
        if stage.options_class is TrainOptions:
            flags["resume"] = os.path.exists(stage.flags["output_dir"])  # the first run has nothing to continue
    built = [
        build_options(stage.options_class, {**stage.flags, **flags})
        for stage, flags in zip(stages, run_flags, strict=True)
    ]
    finished = Finished(folder / "stages.json")
    open_stages = [finished.check(stage) for stage in stages]
    for stage, is_open in zip(stages, open_stages, strict=True):
        console.info(f"{stage.name:<8} {'pending' if is_open else 'finished'}")
    if options.dry_run:
        return
    if any(open_stages):
        with connect(options.address, options.verbose):
            for stage, stage_options, is_open in zip(stages, built, open_stages, strict=True):
                if is_open:
                    console.info(f"\n== {stage.name}", BOLD)
                    stage.command(stage_options, console)
                    finished.add(stage)
    _compare(folder, console)


class Finished:
    """Finished stages and their flags, in a JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._flags: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def check(self, stage: Stage) -> bool:
        """Return True if the stage is pending; UserError if it was finished with other flags."""
        before = self._flags.get(stage.name)
        for name in sorted({*(before or {}), *stage.flags}) if before else ():
            was, now = before.get(name), stage.flags.get(name)
            if was != now:
                raise UserError(
                    f"--output_dir: stage {stage.name} was finished there with {name} {was}, now it is {now}: choose "
                    f"another folder, or remove this stage and those after it from {self._path}"
                )
        return before is None

    def add(self, stage: Stage) -> None:
        """Record a finished stage."""
        self._flags[stage.name] = stage.flags
        partial = self._path.with_suffix(".part")
        partial.write_text(json.dumps(self._flags, indent=2) + "\n")
        partial.replace(self._path)


def _compare(folder: Path, console: Console) -> None:
    before, after = (json.loads((folder / f"{name}.json").read_text()) for name in ("before", "after"))
    console.info("")
    console.table(("", "before", "after"), [(m, f"{before[m]:.4f}", f"{after[m]:.4f}") for m in METRICS])
    console.info(f"model: {folder / 'model'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(RecipeOptions, recipe, "recipe", argv, prog="python jobs/recipe.py")


if __name__ == "__main__":
    raise SystemExit(main())
