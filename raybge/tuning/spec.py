"""Specs of hyperparameter tuning: the options of `raybge.tune`, resolved once and checked before any row is read."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raybge.cli.checks import check_at_least
from raybge.cli.flag import Flag
from raybge.cli.options import MineOptions, TrainOptions, TuneOptions
from raybge.cli.parser import build_options, changed_values, declared_flags, read_config
from raybge.cluster.connection import joins_cluster
from raybge.cluster.spec import ScaleSpec
from raybge.evaluation.spec import ValidationSpec
from raybge.training.spec import InputPaths
from raybge.tuning.command_lines import command_words
from raybge.tuning.population import check_population
from raybge.tuning.search_space import MINING_PREFIX, Domain
from raybge.tuning.search_space_parser import parse_search_space
from raybge.tuning.trial_spec import TrialSpec
from raybge.util.errors import UserError
from raybge.util.filesystem import STATE_FOLDER

DEFAULT_SEARCH = ("learning_rate=loguniform(1e-6,1e-4)", "temperature=uniform(0.01,0.1)")
SEARCH_FILE = "search.json"  # settings that a continued search must have in common with its beginning
PACKAGES = {"hyperopt": ("hyperopt",), "bohb": ("hpbandster", "ConfigSpace")}
# Spellings of FlagEmbedding's mining script; training has flags of the same canonical name. As searched flags they
# belong to mining.
MINING_SPELLINGS = {
    *("embedder_query_max_length", "embedder_passage_max_length"),
    *("query_instruction_format_for_retrieval", "passage_instruction_format_for_retrieval"),
}
# Flags of the search itself, and of its location: all others are the trials'.
SEARCH_FLAGS = {name for name in declared_flags(TuneOptions) if name not in declared_flags(TrainOptions)}
LOCATION_FLAGS = {
    *("config", "dry_run", "verbose", "address", "resume", "overwrite_output_dir", "output_dir", "storage_path"),
}


@dataclass(frozen=True)
class SearchAlgorithmSpec:
    """Sampling, comparison and early stopping of trials.

    Args:
        space: domain of each searched flag.
        metric: metric by which trials are compared.
        mode: "max" or "min".
        num_samples: trials, or rounds over the grids.
        algorithm: "optuna", "hyperopt", "bohb" or "random".
        scheduler: "asha", "median", "pbt" or "none".
        max_concurrent: most trials at a time; None: as many as fit.
        time_budget: seconds after which no trial continues; None: no limit.
        seed: of sampling.
    """

    space: Mapping[str, Domain]
    metric: str
    mode: str
    num_samples: int
    algorithm: str
    scheduler: str
    max_concurrent: int | None
    time_budget: float | None
    seed: int

    @classmethod
    def from_options(
        cls, options: TuneOptions, space: Mapping[str, Domain], mines: bool = False
    ) -> SearchAlgorithmSpec:
        """Read and check the flags of the search.

        Args:
            options: options of the command.
            space: domain of each searched flag.
            mines: each trial mines its negatives first.

        Returns:
            The spec.

        Raises:
            UserError: a number out of range, or flags that do not go together.
        """
        check_at_least(1, options, "num_samples", "max_concurrent")
        if options.time_budget is not None and options.time_budget <= 0:
            raise UserError(f"--time_budget must be above 0 seconds, found {options.time_budget:g}")
        spec = cls(
            space=space,
            metric=options.metric,
            mode=options.mode,
            num_samples=options.num_samples,
            algorithm=_choose_algorithm(options, space),
            scheduler=options.scheduler,
            max_concurrent=options.max_concurrent,
            time_budget=options.time_budget,
            seed=_seed(options),
        )
        if spec.scheduler == "pbt":
            check_population(space, mines)
        if spec.pauses_trials and options.training.get("save_only_model"):
            raise UserError("--save_only_model: trials of this search pause, and continue from full checkpoints")
        return spec

    @property
    def pauses_trials(self) -> bool:
        """Return whether trials pause and continue from a checkpoint."""
        return self.scheduler == "pbt" or self.algorithm == "bohb"

    @property
    def trials(self) -> int:
        """Return the number of trials; grids multiply it."""
        total = self.num_samples
        for domain in self.space.values():
            total *= len(domain.arguments) if domain.grid else 1
        return total


@dataclass(frozen=True)
class TuningSpec:
    """Checked configuration of a search.

    Args:
        search: sampling, comparison and early stopping of trials.
        model: name of the model from which all trials start.
        train_data: files, folders or globs of the groups.
        has_scores: the groups have scores of a cross-encoder.
        on_bad_rows: "stop" or "skip".
        any_text: --accept_any_text, see `SourceFile`.
        validation: evaluation data; None: groups are held out of `train_data`.
        held_out: share of the groups that is held out.
        inputs: paths that every worker reads.
        training_flags: flags of raybge.train that every trial has, as the user set them.
        mining: flags of raybge.mine that every trial has, as the user set them; None if trials mine nothing.
        output: absolute path of the output folder.
        work: folder of held-out groups and of vectors to mine with, which all trials share.
        resume: continue the search of the output folder.
        dry_run: print the plan and stop.
        scale: workers of each trial, and the cluster.
        settings: flags of the search that must not change when it is continued.
        command: words of the search's own command line.
    """

    search: SearchAlgorithmSpec
    model: str
    train_data: tuple[str, ...]
    has_scores: bool
    on_bad_rows: str
    any_text: bool
    validation: ValidationSpec | None
    held_out: float
    inputs: InputPaths
    training_flags: Mapping[str, Any] = field(repr=False)  # with the token
    mining: Mapping[str, Any] | None
    output: Path
    work: Path
    resume: bool
    dry_run: bool
    scale: ScaleSpec
    settings: Mapping[str, Any]
    command: tuple[str, ...]

    @classmethod
    def from_options(cls, options: TuneOptions) -> TuningSpec:
        """Check the options, the search space and both ends of each domain, and resolve them.

        Args:
            options: options of the command.

        Returns:
            The spec.

        Raises:
            UserError: a flag, a domain or the output folder is invalid.
        """
        mining = read_mine_config(options)
        space = parse_search_space(options.search or DEFAULT_SEARCH, searchable_flags(mining))
        search = SearchAlgorithmSpec.from_options(options, space, mining is not None)
        for name in ("ema", "average_checkpoints", "keep_better"):
            if getattr(options, name):
                raise UserError(
                    f"--{name}: trials are compared by their last weights; train with it and the best trial's flags"
                )
        if options.batch_vectors and not options.eval_data:
            raise UserError(
                "--batch_vectors has a vector for each row of --train_data, and trials train on a part of them: give "
                "--eval_data too"
            )
        if not 0 < options.held_out < 1:
            raise UserError(f"--held_out must be between 0 and 1, found {options.held_out:g}")
        training = training_flags(options)
        _check_domains(options, space, training, mining)
        output = Path(os.path.abspath(options.training["output_dir"]))
        _check_output(options, output)
        scale = ScaleSpec.from_options(options)
        return cls(
            search=search,
            model=options.model_name_or_path,
            train_data=tuple(options.train_data),
            has_scores=options.knowledge_distillation,
            on_bad_rows=options.on_bad_rows,
            any_text=options.accept_any_text,
            validation=ValidationSpec.from_options(options),
            held_out=options.held_out,
            inputs=InputPaths.from_options(options),
            training_flags=training,
            mining=mining,
            output=output,
            work=Path(os.path.abspath(options.storage_path)) if options.storage_path else output / STATE_FOLDER,
            resume=options.resume,
            dry_run=options.dry_run,
            scale=replace(scale, num_workers=scale.num_workers or "1"),
            settings=search_settings(options),
            command=tuple(search_command(options)),
        )


def training_flags(options: TuneOptions) -> dict[str, Any]:
    """Return the flags of raybge.train that the user set, and the token; without the output folder."""
    changed = {
        name: value for name, value in changed_values(options).items() if name not in SEARCH_FLAGS | LOCATION_FLAGS
    }
    return {**changed, "token": options.token}


def search_settings(options: TuneOptions) -> dict[str, Any]:
    """Return the flags of the search that must not change when it is continued; the space is compared separately."""
    free = {"search", "max_concurrent", "time_budget"}
    return {name: getattr(options, name) for name in sorted(SEARCH_FLAGS - free)}


def search_command(options: TuneOptions) -> list[str]:
    """Return the words of the search's own command line."""
    changed = changed_values(options)
    return command_words("tune", {n: v for n, v in changed.items() if n not in ("resume", "overwrite_output_dir")})


def read_mine_config(options: TuneOptions) -> dict[str, Any] | None:
    """Read the flags of raybge.mine in --mine_config; None if the flag is unset.

    Args:
        options: options of the command.

    Returns:
        Values by canonical flag name.

    Raises:
        UserError: the file cannot be read, or sets a flag that the search determines.
    """
    if options.mine_config is None:
        return None
    flags = read_config(options.mine_config, declared_flags(MineOptions), "--mine_config")
    for name in ("input_file", "output_file", "storage_path"):
        if name in flags:
            raise UserError(f"--mine_config {options.mine_config}: {name} is determined by the search; remove it")
    return {"model_name_or_path": options.model_name_or_path, **flags}


def searchable_flags(mining: Mapping[str, Any] | None) -> dict[str, Flag]:
    """Return the flags that can be searched, by name.

    If trials mine, mining's flags are among them: with the prefix `mine.` where training has a flag of the same name.

    Args:
        mining: flags of raybge.mine; None if trials mine nothing.

    Returns:
        Flags of training, then those of mining.
    """
    training = declared_flags(TrainOptions)
    if mining is None:
        return training
    flags = {
        name: replace(f, aliases=tuple(alias for alias in f.aliases if alias not in MINING_SPELLINGS))
        for name, f in training.items()
    }
    for name, f in declared_flags(MineOptions).items():
        if name not in training:
            flags[name] = f
            continue
        own = tuple(alias for alias in f.aliases if alias in MINING_SPELLINGS)
        prefixed = tuple(f"{MINING_PREFIX}{spelling}" for spelling in f.spellings)
        flags[prefixed[0]] = replace(f, name=prefixed[0], aliases=(*prefixed[1:], *own))
    return flags


# --- checks -----------------------------------------------------------------------------------------------------------


def _seed(options: TuneOptions) -> int:
    return int(options.training.get("seed", 42))


def _choose_algorithm(options: TuneOptions, space: Mapping[str, Domain]) -> str:
    """Return the sampling algorithm: Optuna by default, random sampling for grids and for population based training.

    Raises UserError if the requested algorithm cannot run this search.
    """
    grids = [name for name, domain in space.items() if domain.grid]
    algorithm = options.search_alg or ("random" if grids or options.scheduler == "pbt" else "optuna")
    if algorithm == "random":
        return algorithm
    if options.scheduler == "pbt":
        raise UserError(
            f"--search_alg {algorithm} learns from completed trials, but --scheduler pbt changes trials while they "
            "train; use --search_alg random"
        )
    if grids:
        raise UserError(
            f"--search_alg {algorithm} samples values and does not support grids: search {grids[0]} with choice(...)"
        )
    if algorithm == "bohb" and options.scheduler != "asha":
        raise UserError(
            f"--scheduler {options.scheduler}: --search_alg bohb has its own early stopping; leave --scheduler unset"
        )
    if missing := [name for name in PACKAGES.get(algorithm, ()) if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--search_alg {algorithm} requires a package that is not installed: pip install {' '.join(missing)}"
        )
    return algorithm


def _check_domains(
    options: TuneOptions, space: Mapping[str, Domain], training: Mapping[str, Any], mining: Mapping[str, Any] | None
) -> None:
    """Check the flags of a trial with each value of a list and with both ends of each interval."""
    flags = {**training, "eval_data": options.eval_data or ["held out"]}
    trial_spec = TrialSpec(flags, "", 1, "", mining)
    for name, domain in space.items():
        for value in domain.arguments if domain.categorical else domain.arguments[:2]:
            try:
                _check_trial(trial_spec, {name: value}, joins_cluster(options.address))
            except UserError as error:
                raise UserError(f"--search {name}={domain}: {error}") from error


def _check_trial(trial_spec: TrialSpec, hyperparameters: Mapping[str, Any], in_cluster: bool) -> None:
    """Raise UserError if a trial with these hyperparameters would have invalid flags."""
    from raybge.mining.spec import check_options as check_mining
    from raybge.training.spec import TrainingSpec
    from raybge.training.tasks.finetune_spec import FinetuneSpec
    from raybge.training.trainer_check import check_trainer

    mining, training = trial_spec.stage_flags(hyperparameters, "mined.jsonl", "trial")
    if mining:
        check_mining(build_options(MineOptions, mining))
    spec = TrainingSpec.from_options(build_options(TrainOptions, training), FinetuneSpec)
    check_trainer(spec.trainer, in_cluster)


def _check_output(options: TuneOptions, output: Path) -> None:
    for name, place in (("output_dir", options.training["output_dir"]), ("storage_path", options.storage_path)):
        if place and "://" in place:
            raise UserError(f"--{name} {place}: URIs are not supported here; use a folder that all nodes share")
    if options.overwrite_output_dir and options.resume:
        raise UserError("--overwrite_output_dir removes the search that --resume continues: use only one of them")
    if not output.exists() or options.overwrite_output_dir or all(p.name == STATE_FOLDER for p in output.iterdir()):
        return
    if not options.resume:
        raise UserError(
            f"--output_dir {output} is not empty; choose another, or add --overwrite_output_dir, or --resume to "
            "continue its search"
        )
    if not (output / STATE_FOLDER / SEARCH_FILE).is_file():
        raise UserError(f"--output_dir {output} is not empty and contains no search to continue")
