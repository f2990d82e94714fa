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
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.cli.console import Console
from raybge.cli.options import TuneOptions
from raybge.cluster.resources import connect, grown, plan_workers, side_by_side
from raybge.cluster.shared_paths import check_shared
from raybge.tuning.search_space import Domain, parse
from raybge.tuning.spec import (
    OWN,
    PATHS,
    SEARCH_FILE,
    absolute,
    check,
    commands,
    mining_of,
    own_command,
    searched,
    trained,
    trial_mining,
    work_folder,
)
from raybge.util.errors import UserError
from raybge.util.filesystem import HIDDEN
from raybge.util.redaction import public_values

if TYPE_CHECKING:
    from raybge.cluster.resources import Cluster, Plan
    from raybge.data.survey import Survey
    from raybge.tuning.records import Trial
    from raybge.tuning.trial import Task

DEFAULT = ("learning_rate=loguniform(1e-6,1e-4)", "temperature=uniform(0.01,0.1)")
SHARED = "shared"  # what trials have in common, while the search runs
BEST, TRIALS, BEST_FILE = "best", "trials", "best.json"
RESULTS = (BEST_FILE, "trials.csv", "trials.json", "report.html")


def tune(arguments: TuneOptions, console: Console) -> dict[str, Any]:
    """The command: check, hold out, plan, search, report."""
    from raybge.tuning.ray_tune import Search, pauses
    from raybge.tuning.trial import Task

    mining = mining_of(arguments)
    space = parse(arguments.search or DEFAULT, searched(mining))
    output = check(arguments, space, mining)
    if arguments.resume and (output / BEST_FILE).is_file():
        console.info(f"nothing to continue: the search of {output} is finished")
        return dict(json.loads((output / BEST_FILE).read_text()))
    found = _survey(arguments, output, console)
    wanted = arguments.num_workers or "1", arguments.use_gpu, arguments.cpus_per_worker
    with connect(arguments.address, arguments.verbose) as cluster:
        cluster = grown(cluster, *wanted, console.info, runs=arguments.max_concurrent or 1)
        _check_shared(arguments, mining, cluster, output)
        plan = plan_workers(cluster, *wanted)
        runs = min(arguments.max_concurrent or arguments.num_samples, side_by_side(cluster, plan))
        _describe(arguments, space, cluster, plan, runs, console)
        flags = _trial_flags(arguments, found, plan, output, console)
        if arguments.dry_run:
            return {}
        _begin(arguments, space, flags, output)
        task = Task(
            flags,
            folder=str(output / TRIALS),
            runs=runs,
            shared=str(output / HIDDEN / SHARED),
            mining=mining and trial_mining(mining, flags, work_folder(arguments, output)),
            pauses=pauses(arguments),
        )
        with _shown(arguments, space, task, output, console) as on_change:
            trials = Search(arguments, space, task, output / HIDDEN, on_change).run()
    return _finish(arguments, trials, task, output, console)


def _check_shared(arguments: TuneOptions, mining: Mapping[str, Any] | None, cluster: Cluster, output: Path) -> None:
    """UserError where a node does not see what trials read and write."""
    from raybge.data.source_files import list_files
    from raybge.training.spec import inputs_of

    read = inputs_of(arguments, list_files(arguments.train_data, "--train_data"))
    pool = (mining or {}).get("corpus_data") or []
    read["--mine_config"] = [pool] if isinstance(pool, str) else pool
    written = {"--output_dir": str(output), "--storage_path": str(work_folder(arguments, output))}
    check_shared(cluster, written, read)


# --- plan -------------------------------------------------------------------------------------------------------------


def _describe(
    arguments: TuneOptions, space: Mapping[str, Domain], cluster: Cluster, plan: Plan, runs: int, console: Console
) -> None:
    from raybge.tuning.ray_tune import algorithm

    who = "hyperband" if arguments.search_alg == "bohb" else arguments.scheduler
    ways = {"none": "none stopped early", "pbt": "the worst replaced by the best after each quarter (pbt)"}
    stopping = ways.get(who, f"stopped early by {who}")
    at_a_time = "one after the other" if runs == 1 else f"{runs} at a time"
    console.info(f"cluster: {cluster.describe()}; trials {at_a_time}, each of {plan.describe('training worker')}")
    console.info(
        f"search: {arguments.num_samples} {'rounds' if any(d.grid for d in space.values()) else 'trials'} drawn by "
        f"{algorithm(arguments, space)}, {stopping}, for the {arguments.mode}imum of {arguments.metric}"
    )
    for name, domain in space.items():
        console.info(f"  {name}: {domain}")


def _trial_flags(arguments: TuneOptions, found: Survey, plan: Plan, output: Path, console: Console) -> dict[str, Any]:
    """A trial's flags but for those that are drawn; paths are absolute, since a trial runs in a folder of Ray's."""
    from raybge.tuning.held_out_split import hold_out
    from raybge.tuning.population import INTERVAL
    from raybge.tuning.ray_tune import pauses
    from raybge.tuning.trial import EVALUATIONS

    flags: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1 / EVALUATIONS if arguments.scheduler != "pbt" else INTERVAL / 100,
        "save_strategy": "no",
        "report_to": "none",
    }
    flags |= {name: value for name, value in trained(arguments).items() if name != "output_dir" and value is not None}
    flags |= {"num_workers": str(plan.workers), "cpus_per_worker": plan.cpus, "use_gpu": bool(plan.gpus)}
    if pauses(arguments):  # each evaluation may be where a trial goes on
        flags |= {"save_strategy": flags["eval_strategy"], "save_steps": flags["eval_steps"]}
    if arguments.eval_data:
        flags |= {name: [*map(absolute, flags[name])] for name in ("eval_data", "eval_corpus") if name in flags}
        flags["train_data"] = [*map(absolute, arguments.train_data)]
    else:
        split = hold_out(found, arguments.held_out, arguments.training.get("seed", 42), work_folder(arguments, output))
        flags |= {"train_data": [split.train], "eval_data": [split.dev], "eval_corpus": [split.corpus]}
        console.info(
            f"held out: {split.held_out:,} of {split.held_out + split.trained:,} groups, searched in every `pos` and "
            "`neg` of the data"
        )
    return {**flags, **{name: absolute(flags[name]) for name in PATHS if isinstance(flags.get(name), str)}}


def _survey(arguments: TuneOptions, output: Path, console: Console) -> Survey:
    """Check every row once, before trials do so each for itself; the rows to train on."""
    from raybge.data.groups import parse_group, parse_scored_group
    from raybge.data.source_files import list_files
    from raybge.data.survey import named, survey
    from raybge.evaluation.eval_data import prepare
    from raybge.tuning.held_out_split import BLOCK_BYTES

    files = list_files(arguments.train_data, "--train_data")
    parse = parse_scored_group if arguments.knowledge_distillation else parse_group
    found = survey(files, BLOCK_BYTES, parse, arguments.on_bad_rows)
    if found.bad_count:
        console.info(f"--train_data: {found.bad_count:,} rows are left out\n{named(found)}")
    validation = prepare(arguments, output)
    for line in validation.lines() if validation else []:
        console.info(line)
    return found


# --- run --------------------------------------------------------------------------------------------------------------


def _begin(arguments: TuneOptions, space: Mapping[str, Domain], flags: Mapping[str, Any], output: Path) -> None:
    """Make room for a new search, or see that an old one is the same."""
    from raybge.tuning.ray_tune import NAME

    asked = {name: getattr(arguments, name) for name in sorted(OWN - {"search", "max_concurrent", "time_budget"})}
    written = {name: str(domain) for name, domain in space.items()}
    about = public_values({"space": written, "search": asked, "trials": dict(flags)})
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
    for folder in (TRIALS, BEST, f"{HIDDEN}/{NAME}", f"{HIDDEN}/{SHARED}"):
        shutil.rmtree(output / folder, ignore_errors=True)
    for name in RESULTS:
        (output / name).unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(about, indent=1) + "\n")


@contextmanager
def _shown(
    arguments: TuneOptions, space: Mapping[str, Domain], task: Task, output: Path, console: Console
) -> Iterator[Any]:
    """What is called when trials change: a line for each that ends, and all that is known in the output folder."""
    said: set[int] = set()
    written: list[Any] = []
    total = arguments.num_samples
    for domain in space.values():
        total *= len(domain.arguments) if domain.grid else 1
    with console.bar("search", total, "trials") as bar:

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
    arguments: TuneOptions,
    space: Mapping[str, Domain],
    task: Task,
    output: Path,
    trials: Sequence[Trial],
) -> None:
    from raybge.tuning.page import Search as Report
    from raybge.tuning.page import write
    from raybge.tuning.records import best, write_csv, write_json

    write_csv(str(output / "trials.csv"), trials, space)
    write_json(str(output / "trials.json"), trials, space)
    found = best(trials, arguments.metric, arguments.mode)
    report = Report(
        command=own_command(arguments),
        metric=arguments.metric,
        mode=arguments.mode,
        space=space,
        trials=trials,
        best_commands=commands(task, found.history) if found else (),
        about={"model": arguments.model_name_or_path, "early stopping": arguments.scheduler},
    )
    write(str(output / "report.html"), report)


def _finish(
    arguments: TuneOptions, trials: Sequence[Trial], task: Task, output: Path, console: Console
) -> dict[str, Any]:
    """Move the best model in and say what was found."""
    from raybge.tuning.population import ATTEMPTS
    from raybge.tuning.records import best
    from raybge.tuning.trial import MODEL

    found = best(trials, arguments.metric, arguments.mode)
    if found is None or found.status != "finished":
        raise UserError(f"no trial came to its end: see {output / 'trials.csv'} for why")
    model = output / TRIALS / found.id / MODEL
    if model.is_dir():
        shutil.rmtree(output / BEST, ignore_errors=True)
        model.rename(output / BEST)
    again = " && ".join(map(shlex.join, commands(task, found.history)))
    result = {"flags": found.flags, "metrics": found.metrics, "command": again}
    (output / BEST_FILE).write_text(json.dumps(result, indent=1) + "\n")
    for folder in (Path(task.shared), *(output / TRIALS).glob(f"*/{ATTEMPTS}")):
        shutil.rmtree(folder, ignore_errors=True)
    console.info(_line(found, arguments.metric))
    console.info(f"best: {output / BEST}; all trials: {output / 'trials.csv'}; report: {output / 'report.html'}")
    console.info(f"the same model again: {again}")
    return result
