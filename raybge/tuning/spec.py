"""What the flags of `raybge.tune` come to: which of them are a trial's, and the command lines that they make."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.cli.options import MineOptions, TrainOptions, TuneOptions
from raybge.cli.parser import Flag, build, declared, given, read_config
from raybge.tuning import population
from raybge.tuning.search_space import Domain
from raybge.util.errors import UserError
from raybge.util.filesystem import HIDDEN
from raybge.util.redaction import public_values

if TYPE_CHECKING:
    from raybge.tuning.trial import Task

SEARCH_FILE = "search.json"  # what a search that is continued must have in common
# Flags of the search itself, and of where and how it runs: all others are the trials'.
OWN = {f for f in declared(TuneOptions) if f not in declared(TrainOptions)}
PLACE = {"config", "dry_run", "verbose", "address", "resume", "overwrite_output_dir", "output_dir", "storage_path"}
PATHS = ("model_name_or_path", "config_name", "tokenizer_name", "cache_dir", "guide_model", "logging_dir", "deepspeed")


def mining_of(arguments: TuneOptions) -> dict[str, Any] | None:
    """The flags of raybge.mine that each trial begins with, None where it mines nothing."""
    if arguments.mine_config is None:
        return None
    found = read_config(arguments.mine_config, declared(MineOptions), "--mine_config")
    for name in ("input_file", "output_file", "storage_path"):
        if name in found:
            raise UserError(f"--mine_config {arguments.mine_config}: {name} is the search's own to choose")
    return {"model_name_or_path": arguments.model_name_or_path, **found}


def searched(mining: Mapping[str, Any] | None) -> dict[str, Flag]:
    """The flags that may be searched: training's, and mining's where they do not have the name of one of these."""
    return {**(declared(MineOptions) if mining is not None else {}), **declared(TrainOptions)}


def check(arguments: TuneOptions, space: Mapping[str, Domain], mining: Mapping[str, Any] | None) -> Path:
    """Everything that can be said about the flags alone, at the ends of each domain too; returns the output folder."""
    from raybge.tuning.ray_tune import algorithm, pauses

    for name in ("num_samples", "max_concurrent"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}")
    if arguments.time_budget is not None and arguments.time_budget <= 0:
        raise UserError(f"--time_budget must be above 0 seconds, found {arguments.time_budget:g}")
    if not 0 < arguments.held_out < 1:
        raise UserError(f"--held_out must be between 0 and 1, found {arguments.held_out:g}")
    algorithm(arguments, space)
    if arguments.scheduler == "pbt":
        population.check(space, mining is not None)
    if pauses(arguments) and arguments.training.get("save_only_model"):
        raise UserError("--save_only_model: trials of this search pause, and go on from their checkpoints")
    for name, domain in space.items():
        for value in domain.arguments if domain.categorical else domain.arguments[:2]:
            try:
                _check_trial(arguments, {name: value}, mining)
            except UserError as error:
                raise UserError(f"--search {name}={domain}: {error}") from error
    output = Path(os.path.abspath(arguments.training["output_dir"]))
    _check_output(arguments, output)
    return output


def _check_trial(arguments: TuneOptions, drawn: Mapping[str, Any], mining: Mapping[str, Any] | None) -> None:
    """Whether a trial could have these flags."""
    from raybge.mining.spec import check as check_mining
    from raybge.training.spec import check_recipe
    from raybge.training.trainer_arguments import check
    from raybge.tuning.trial import Task

    flags = {**trained(arguments), "eval_data": arguments.eval_data or ["held out"]}
    first, second = Task(flags, "", 1, "", mining).stages(drawn, "mined.jsonl", flags["output_dir"])
    if first:
        check_mining(build(MineOptions, first), embedded=False)
    trial = build(TrainOptions, second)
    check_recipe(trial)
    check(trial)


def _check_output(arguments: TuneOptions, output: Path) -> None:
    for name, place in (("output_dir", arguments.training["output_dir"]), ("storage_path", arguments.storage_path)):
        if place and "://" in place:
            raise UserError(f"--{name} {place}: give a folder that all nodes share; a URI is not built yet")
    if arguments.overwrite_output_dir and arguments.resume:
        raise UserError("--overwrite_output_dir removes the search that is to be continued: leave it out, or the other")
    if not output.exists() or arguments.overwrite_output_dir or all(p.name == HIDDEN for p in output.iterdir()):
        return
    if not arguments.resume:
        raise UserError(
            f"--output_dir {output} is not empty; choose another, or add --overwrite_output_dir, or --resume to "
            "continue its search"
        )
    if not (output / HIDDEN / SEARCH_FILE).is_file():
        raise UserError(f"--output_dir {output} is not empty, and there is no search in it to continue")


def trained(arguments: TuneOptions) -> dict[str, Any]:
    """The flags that were given and are a training run's."""
    found = {name: value for name, value in given(arguments).items() if name not in OWN | PLACE}
    return {**found, "output_dir": arguments.training["output_dir"], "token": arguments.token}


def work_folder(arguments: TuneOptions, output: Path) -> Path:
    """Where lies what trials share: groups held out, and vectors to mine with."""
    return Path(os.path.abspath(arguments.storage_path)) if arguments.storage_path else output / HIDDEN


def trial_mining(mining: Mapping[str, Any], flags: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """A trial's flags of raybge.mine; vectors are kept for all trials."""
    where = {name: flags[name] for name in ("num_workers", "cpus_per_worker", "use_gpu")}
    found = {**where, **mining, "storage_path": str(work)}
    if "corpus_data" in found:
        pool = found["corpus_data"]
        found["corpus_data"] = [*map(absolute, pool if isinstance(pool, list) else [pool])]
    paths = ("model_name_or_path", "cross_encoder", "cache_dir")
    return {**found, **{name: absolute(found[name]) for name in paths if isinstance(found.get(name), str)}}


def absolute(path: str) -> str:
    """A path that holds from any folder; URIs, and names of models in the hub, as they are."""
    there = "://" not in path and (os.path.exists(path) or any(each in path for each in "*?["))
    return os.path.abspath(path) if there else path


def own_command(arguments: TuneOptions) -> list[str]:
    """The words of the search's own command line."""
    asked = {name: value for name, value in given(arguments).items() if name not in ("resume", "overwrite_output_dir")}
    return ["python", "-m", "raybge.tune", *_flag_words(asked)]


def commands(task: Task, history: Sequence[tuple[int, Mapping[str, Any]]]) -> list[list[str]]:
    """The words of the command lines that train a trial's model again (see Trial's `history`).

    raybge.mine's is one of them where the trial mined. Where flags changed while it trained, each further command goes
    on from a checkpoint of the one before.
    """
    found = []
    for i, (step, drawn) in enumerate(history):
        output = "OUTPUT_DIR" if len(history) == 1 else f"OUTPUT_DIR-{i + 1}"
        mining, training = task.stages(drawn, "MINED.jsonl", output)
        if mining:
            found.append(["python", "-m", "raybge.mine", *_flag_words(mining)])
        if i:
            training["resume_from_checkpoint"] = f"OUTPUT_DIR-{i}/checkpoint-{step}"
        found.append(["python", "-m", "raybge.train", *_flag_words(training)])
    return found


def _flag_words(flags: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in public_values(flags).items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return words
