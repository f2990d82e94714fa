"""Search training flags with Ray Tune; every trial is a `raybge.train` run, measured while it trains.

    python -m raybge.tune --model_name_or_path BAAI/bge-small-en-v1.5 --train_data groups.jsonl \\
        --output_dir runs/search --num_samples 12 --search "learning_rate=loguniform(1e-6,1e-4)"
    python -m raybge.tune --help

From Python: `raybge.tune_finetune(model_name_or_path=..., train_data=..., output_dir=..., search=[...])`.

The output folder gets `best/`, the best trial's model; `trials.csv` and `trials.json`; `report.html`. A search that was
killed goes on with --resume.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge import cli
from raybge.arguments import MineArguments, TrainArguments, TuneArguments
from raybge.checkpoints import HIDDEN
from raybge.cluster import connect, plan_workers, side_by_side
from raybge.errors import UserError
from raybge.flags import Flag, build, declared, given, read_config
from raybge.screen import Screen
from raybge.tuning.space import Domain, parse

if TYPE_CHECKING:
    from raybge.cluster import Cluster, Plan
    from raybge.data.survey import Survey
    from raybge.tuning.trial import Task
    from raybge.tuning.trials import Trial

DEFAULT = ("learning_rate=loguniform(1e-6,1e-4)", "temperature=uniform(0.01,0.1)")
BEST, TRIALS, BEST_FILE = "best", "trials", "best.json"
RESULTS = (BEST_FILE, "trials.csv", "trials.json", "report.html")
SEARCH_FILE = "search.json"  # what a search that is continued must have in common
# Flags of the search itself, and of where and how it runs: all others are the trials'.
OWN = {f for f in declared(TuneArguments) if f not in declared(TrainArguments)}
PLACE = {"config", "dry_run", "verbose", "address", "resume", "overwrite_output_dir", "output_dir", "storage_path"}
PATHS = ("model_name_or_path", "config_name", "tokenizer_name", "cache_dir", "guide_model", "logging_dir", "deepspeed")


def tune_finetune(**flags: Any) -> dict[str, Any]:
    """Search training flags; the arguments are the command's flags.

    Returns the best trial's `flags`, `metrics` and the `command` that trains it again.

    Raises UserError, before any model loads, for flags, files or rows that cannot be used.
    """
    return cli.call(TuneArguments, tune, "tune", flags)


def tune(arguments: TuneArguments, screen: Screen) -> dict[str, Any]:
    """The command: check, hold out, plan, search, report."""
    from raybge.tuning.search import Search
    from raybge.tuning.trial import Task

    mining = _mining(arguments)
    space = parse(arguments.search or DEFAULT, _searched(mining))
    output = _check(arguments, space, mining)
    if arguments.resume and (output / BEST_FILE).is_file():
        screen.say(f"nothing to continue: the search of {output} is finished")
        return dict(json.loads((output / BEST_FILE).read_text()))
    found = _survey(arguments, output, screen)
    with connect(arguments.address, arguments.verbose) as cluster:
        plan = plan_workers(cluster, arguments.num_workers or "1", arguments.use_gpu, arguments.cpus_per_worker)
        runs = min(arguments.max_concurrent or arguments.num_samples, side_by_side(cluster, plan))
        _describe(arguments, space, cluster, plan, runs, screen)
        flags = _trial_flags(arguments, found, plan, output, screen)
        if arguments.dry_run:
            return {}
        _begin(arguments, space, flags, output)
        task = Task(
            flags, str(output / TRIALS), runs, mining and _trial_mining(mining, flags, _work(arguments, output))
        )
        with _shown(arguments, space, task, output, screen) as on_change:
            trials = Search(arguments, space, task, output / HIDDEN, on_change).run()
    return _finish(arguments, trials, task, output, screen)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(TuneArguments, tune, "tune", argv)


# --- check ------------------------------------------------------------------------------------------------------------


def _mining(arguments: TuneArguments) -> dict[str, Any] | None:
    """The flags of raybge.mine that each trial begins with, None where it mines nothing."""
    if arguments.mine_config is None:
        return None
    found = read_config(arguments.mine_config, declared(MineArguments), "--mine_config")
    for name in ("input_file", "output_file", "storage_path"):
        if name in found:
            raise UserError(f"--mine_config {arguments.mine_config}: {name} is the search's own to choose")
    return {"model_name_or_path": arguments.model_name_or_path, **found}


def _searched(mining: Mapping[str, Any] | None) -> dict[str, Flag]:
    """The flags that may be searched: training's, and mining's where they do not have the name of one of these."""
    return {**(declared(MineArguments) if mining is not None else {}), **declared(TrainArguments)}


def _check(arguments: TuneArguments, space: Mapping[str, Domain], mining: Mapping[str, Any] | None) -> Path:
    """Everything that can be said about the flags alone, at the ends of each domain too; returns the output folder."""
    from raybge.tuning.search import algorithm

    for name in ("num_samples", "max_concurrent"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}")
    if arguments.time_budget is not None and arguments.time_budget <= 0:
        raise UserError(f"--time_budget must be above 0 seconds, found {arguments.time_budget:g}")
    if not 0 < arguments.held_out < 1:
        raise UserError(f"--held_out must be between 0 and 1, found {arguments.held_out:g}")
    algorithm(arguments, space)
    for name, domain in space.items():
        for value in domain.arguments if domain.categorical else domain.arguments[:2]:
            try:
                _check_trial(arguments, {name: value}, mining)
            except UserError as error:
                raise UserError(f"--search {name}={domain}: {error}") from error
    output = Path(os.path.abspath(arguments.training["output_dir"]))
    _check_output(arguments, output)
    return output


def _check_trial(arguments: TuneArguments, drawn: Mapping[str, Any], mining: Mapping[str, Any] | None) -> None:
    """Whether a trial could have these flags."""
    from raybge.mining_flags import check as check_mining
    from raybge.recipe import check_recipe
    from raybge.training_flags import check
    from raybge.tuning.trial import Task

    flags = {**_trained(arguments), "eval_data": arguments.eval_data or ["held out"]}
    first, second = Task(flags, "", 1, mining).stages(drawn, "mined.jsonl", flags["output_dir"])
    if first:
        check_mining(build(MineArguments, first), embedded=False)
    trial = build(TrainArguments, second)
    check_recipe(trial)
    check(trial)


def _trained(arguments: TuneArguments) -> dict[str, Any]:
    """The flags that were given and are a training run's."""
    found = {name: value for name, value in given(arguments).items() if name not in OWN | PLACE}
    return {**found, "output_dir": arguments.training["output_dir"], "token": arguments.token}


def _work(arguments: TuneArguments, output: Path) -> Path:
    """Where lies what trials share: groups held out, and vectors to mine with."""
    return Path(os.path.abspath(arguments.storage_path)) if arguments.storage_path else output / HIDDEN


def _check_output(arguments: TuneArguments, output: Path) -> None:
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


# --- plan -------------------------------------------------------------------------------------------------------------


def _describe(
    arguments: TuneArguments, space: Mapping[str, Domain], cluster: Cluster, plan: Plan, runs: int, screen: Screen
) -> None:
    from raybge.tuning.search import algorithm

    stopping = "none stopped early" if arguments.scheduler == "none" else f"stopped early by {arguments.scheduler}"
    at_a_time = "one after the other" if runs == 1 else f"{runs} at a time"
    screen.say(f"cluster: {cluster.describe()}; trials {at_a_time}, each of {plan.describe('training worker')}")
    screen.say(
        f"search: {arguments.num_samples} {'rounds' if any(d.grid for d in space.values()) else 'trials'} drawn by "
        f"{algorithm(arguments, space)}, {stopping}, for the {arguments.mode}imum of {arguments.metric}"
    )
    for name, domain in space.items():
        screen.say(f"  {name}: {domain}")


def _trial_flags(arguments: TuneArguments, found: Survey, plan: Plan, output: Path, screen: Screen) -> dict[str, Any]:
    """A trial's flags but for those that are drawn; paths are absolute, since a trial runs in a folder of Ray's."""
    from raybge.tuning.search import EVALUATIONS
    from raybge.tuning.split import hold_out

    flags: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1 / EVALUATIONS,
        "save_strategy": "no",
        "report_to": "none",
    }
    flags |= {name: value for name, value in _trained(arguments).items() if name != "output_dir" and value is not None}
    flags |= {"num_workers": str(plan.workers), "cpus_per_worker": plan.cpus, "use_gpu": bool(plan.gpus)}
    if arguments.eval_data:
        flags |= {name: [*map(_absolute, flags[name])] for name in ("eval_data", "eval_corpus") if name in flags}
        flags["train_data"] = [*map(_absolute, arguments.train_data)]
    else:
        split = hold_out(found, arguments.held_out, arguments.training.get("seed", 42), _work(arguments, output))
        flags |= {"train_data": [split.train], "eval_data": [split.dev], "eval_corpus": [split.corpus]}
        screen.say(
            f"held out: {split.held_out:,} of {split.held_out + split.trained:,} groups, searched in every `pos` and "
            "`neg` of the data"
        )
    return {**flags, **{name: _absolute(flags[name]) for name in PATHS if isinstance(flags.get(name), str)}}


def _survey(arguments: TuneArguments, output: Path, screen: Screen) -> Survey:
    """Check every row once, before trials do so each for itself; the rows to train on."""
    from raybge.data.files import list_files
    from raybge.data.groups import parse_group, parse_scored_group
    from raybge.data.survey import named, survey
    from raybge.tuning.split import BLOCK_BYTES
    from raybge.validation import prepare

    files = list_files(arguments.train_data, "--train_data")
    parse = parse_scored_group if arguments.knowledge_distillation else parse_group
    found = survey(files, BLOCK_BYTES, parse, arguments.on_bad_rows)  # type: ignore[arg-type]
    if found.bad_count:
        screen.say(f"--train_data: {found.bad_count:,} rows are left out\n{named(found)}")
    validation = prepare(arguments, output)
    for line in validation.lines() if validation else []:
        screen.say(line)
    return found


def _trial_mining(mining: Mapping[str, Any], flags: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """A trial's flags of raybge.mine; vectors are kept for all trials."""
    where = {name: flags[name] for name in ("num_workers", "cpus_per_worker", "use_gpu")}
    found = {**where, **mining, "storage_path": str(work)}
    if "candidate_pool" in found:
        pool = found["candidate_pool"]
        found["candidate_pool"] = [*map(_absolute, pool if isinstance(pool, list) else [pool])]
    paths = ("model_name_or_path", "cross_encoder", "cache_dir")
    return {**found, **{name: _absolute(found[name]) for name in paths if isinstance(found.get(name), str)}}


def _absolute(path: str) -> str:
    """A path that holds from any folder; URIs, and names of models in the hub, as they are."""
    there = "://" not in path and (os.path.exists(path) or any(each in path for each in "*?["))
    return os.path.abspath(path) if there else path


# --- run --------------------------------------------------------------------------------------------------------------


def _begin(arguments: TuneArguments, space: Mapping[str, Domain], flags: Mapping[str, Any], output: Path) -> None:
    """Make room for a new search, or see that an old one is the same."""
    from raybge.tuning.search import NAME

    asked = {name: getattr(arguments, name) for name in sorted(OWN - {"search", "max_concurrent", "time_budget"})}
    about = {"space": {name: str(domain) for name, domain in space.items()}, "search": asked, "trials": dict(flags)}
    about["trials"].pop("token", None)
    place = output / HIDDEN / SEARCH_FILE
    if arguments.resume and place.is_file():
        before = json.loads(place.read_text())
        now = json.loads(json.dumps(about))
        for part in about:
            for name in sorted({*before[part], *now[part]}):
                was, is_ = before[part].get(name), now[part].get(name)
                if was != is_:
                    raise UserError(f"--resume: --{name} is {is_}, but {was} in the search of {output}")
        return
    for folder in (TRIALS, BEST, f"{HIDDEN}/{NAME}"):
        shutil.rmtree(output / folder, ignore_errors=True)
    for name in RESULTS:
        (output / name).unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(about, indent=1) + "\n")


@contextmanager
def _shown(
    arguments: TuneArguments, space: Mapping[str, Domain], task: Task, output: Path, screen: Screen
) -> Iterator[Any]:
    """What is called when trials change: a line for each that ends, and all that is known in the output folder."""
    said: set[int] = set()
    written: list[Any] = []
    total = arguments.num_samples
    for domain in space.values():
        total *= len(domain.arguments) if domain.grid else 1
    with screen.bar("search", total, "trials") as bar:

        def on_change(trials: Sequence[Trial]) -> None:
            ended = [trial for trial in trials if trial.status != "running"]
            for trial in ended:
                if trial.number not in said:
                    said.add(trial.number)
                    bar.write(_line(trial, arguments.metric), file=bar.fp)
            known = [(trial.status, trial.steps) for trial in trials]
            if known != written:
                _write(arguments, space, task, output, trials)
                written[:] = known
            bar.update(len(ended) - bar.n)

        yield on_change


def _line(trial: Trial, metric: str) -> str:
    score = trial.score(metric)
    found = f"{metric} {score:.4f}" if score is not None else trial.error or "nothing measured"
    drawn = ", ".join(f"{name} {_short(value)}" for name, value in trial.flags.items())
    return f"trial {trial.number}: {trial.status} at step {trial.steps:,} in {trial.seconds:,.0f} s, {found}; {drawn}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- report -----------------------------------------------------------------------------------------------------------


def _write(
    arguments: TuneArguments,
    space: Mapping[str, Domain],
    task: Task,
    output: Path,
    trials: Sequence[Trial],
) -> None:
    from raybge.report.tune import Search as Report
    from raybge.report.tune import write
    from raybge.tuning.trials import best, write_csv, write_json

    write_csv(str(output / "trials.csv"), trials, space)
    write_json(str(output / "trials.json"), trials, space)
    found = best(trials, arguments.metric, arguments.mode)
    report = Report(
        command=_own_command(arguments),
        metric=arguments.metric,
        mode=arguments.mode,
        space=space,
        trials=trials,
        best_commands=_commands(task, found.flags) if found else (),
        about={"model": arguments.model_name_or_path, "early stopping": arguments.scheduler},
    )
    write(str(output / "report.html"), report)


def _own_command(arguments: TuneArguments) -> list[str]:
    """The words of the search's own command line."""
    asked = {name: value for name, value in given(arguments).items() if name not in ("resume", "overwrite_output_dir")}
    return ["python", "-m", "raybge.tune", *_flag_words(asked)]


def _commands(task: Task, drawn: Mapping[str, Any]) -> list[list[str]]:
    """The words of the command lines that train a trial's model again; raybge.mine's is one where it mined."""
    mining, training = task.stages(drawn, "MINED.jsonl", "OUTPUT_DIR")
    found = [["python", "-m", "raybge.mine", *_flag_words(mining)]] if mining else []
    return [*found, ["python", "-m", "raybge.train", *_flag_words(training)]]


def _flag_words(flags: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in flags.items():
        if name != "token":
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return words


def _finish(
    arguments: TuneArguments, trials: Sequence[Trial], task: Task, output: Path, screen: Screen
) -> dict[str, Any]:
    """Move the best model in and say what was found."""
    from raybge.tuning.trial import MODEL
    from raybge.tuning.trials import best

    found = best(trials, arguments.metric, arguments.mode)
    if found is None or found.status != "finished":
        raise UserError(f"no trial came to its end: see {output / 'trials.csv'} for why")
    model = output / TRIALS / found.id / MODEL
    if model.is_dir():
        shutil.rmtree(output / BEST, ignore_errors=True)
        model.rename(output / BEST)
    again = " && ".join(map(shlex.join, _commands(task, found.flags)))
    result = {"flags": found.flags, "metrics": found.metrics, "command": again}
    (output / BEST_FILE).write_text(json.dumps(result, indent=1) + "\n")
    screen.say(_line(found, arguments.metric))
    screen.say(f"best: {output / BEST}; all trials: {output / 'trials.csv'}; report: {output / 'report.html'}")
    screen.say(f"the same model again: {again}")
    return result


if __name__ == "__main__":
    raise SystemExit(main())
