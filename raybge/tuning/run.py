"""A search, from the command's options to the best model: check, hold out, plan, search, report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.cli.console import Console
from raybge.cli.options import TuneOptions
from raybge.cluster.autoscaling import wait_for_capacity
from raybge.cluster.resources import concurrent_runs
from raybge.cluster.shared_paths import check_shared
from raybge.tuning.spec import SEARCH_FILE, TuningSpec
from raybge.util.errors import UserError
from raybge.util.filesystem import STATE_FOLDER
from raybge.util.redaction import redact_settings

if TYPE_CHECKING:
    from raybge.cluster.resources import Cluster, Plan
    from raybge.data.survey import Survey
    from raybge.tuning.search_space import Domain
    from raybge.tuning.tuning_results import TuningResult

SHARED = "shared"  # folder of data that trials share while the search runs
_EARLY_STOPPING = {"none": "no early stopping", "pbt": "the worst replaced by the best after each quarter (pbt)"}


def tune(options: TuneOptions, console: Console) -> TuningResult:
    """Run the command `raybge.tune`.

    Args:
        options: options of the command.
        console: receives the plan, the progress and the result.

    Returns:
        The best trial; empty on a dry run.

    Raises:
        UserError: a flag, a file or a row is invalid, or no trial finished.
    """
    from raybge.tuning.ray_tune import RayTuneSearch
    from raybge.tuning.trial_spec import TrialSpec, mining_flags
    from raybge.tuning.tuning_results import BEST_FILE, TRIALS, TuningResult, finish_search, report_progress

    spec = TuningSpec.from_options(options)
    output, state = spec.output, spec.output / STATE_FOLDER
    if spec.resume and (output / BEST_FILE).is_file():
        console.info(f"nothing to continue: the search of {output} is finished")
        return TuningResult.read(output)
    with console.phase("checking the data"):
        survey = _survey(spec, console)
    scale, max_concurrent = spec.scale, spec.search.max_concurrent
    with scale.connect(console) as cluster:
        requested = scale.num_workers, scale.use_gpu, scale.cpus_per_worker
        cluster = wait_for_capacity(cluster, *requested, console.info, runs=max_concurrent or 1)
        _check_shared(spec, cluster)
        plan = scale.plan(cluster)
        runs = min(max_concurrent or spec.search.num_samples, concurrent_runs(cluster, plan))
        _print_plan(spec, cluster, plan, runs, console)
        flags = _trial_flags(spec, survey, plan, console)
        if spec.dry_run:
            return TuningResult()
        prepare_output(output, spec.resume, search_identity(spec.search.space, spec.settings, flags))
        trial_spec = TrialSpec(
            flags,
            folder=str(output / TRIALS),
            runs=runs,
            shared=str(state / SHARED),
            mining=mining_flags(spec, flags),
            pauses=spec.search.pauses_trials,
        )
        with report_progress(spec, trial_spec, console) as on_change:
            trials = RayTuneSearch(spec.search, trial_spec, state, on_change).run()
    return finish_search(spec, trial_spec, trials, console)


def _survey(spec: TuningSpec, console: Console) -> Survey:
    """Check every row once, before each trial does, and return the survey of the training data."""
    from raybge.data.groups import parse_group, parse_scored_group
    from raybge.data.source_files import list_files
    from raybge.data.survey import skipped_rows_message, survey
    from raybge.evaluation.validation_data import prepare
    from raybge.tuning.held_out_split import BLOCK_BYTES

    files = list_files(spec.train_data, "--train_data", spec.any_text)
    parse = parse_scored_group if spec.has_scores else parse_group
    counts = survey(files, BLOCK_BYTES, parse, spec.on_bad_rows)
    if counts.bad_count:
        console.info(skipped_rows_message(counts, "--train_data"))
    validation = prepare(spec.validation, spec.output)
    for line in validation.lines() if validation else []:
        console.info(line)
    return counts


def _check_shared(spec: TuningSpec, cluster: Cluster) -> None:
    """Raise UserError if a node does not see the files that trials read and write."""
    from raybge.data.source_files import list_files

    read = spec.inputs.by_flag(list_files(spec.train_data, "--train_data"))
    pool = (spec.mining or {}).get("corpus_data") or []
    read["--mine_config"] = [pool] if isinstance(pool, str) else pool
    written = {"--output_dir": str(spec.output), "--storage_path": str(spec.work)}
    if cache := spec.training_flags.get("cache_path"):
        written["--cache_path"] = cache
    check_shared(cluster, written, read)


# --- plan -------------------------------------------------------------------------------------------------------------


def _print_plan(spec: TuningSpec, cluster: Cluster, plan: Plan, runs: int, console: Console) -> None:
    search = spec.search
    scheduler = "hyperband" if search.algorithm == "bohb" else search.scheduler
    stopping = _EARLY_STOPPING.get(scheduler, f"early stopping by {scheduler}")
    parallel = "one at a time" if runs == 1 else f"{runs} at a time"
    samples = "rounds" if any(domain.grid for domain in search.space.values()) else "trials"
    console.info(f"cluster: {cluster.describe()}; trials {parallel}, each of {plan.describe('training worker')}")
    console.info(
        f"search: {search.num_samples} {samples} sampled by {search.algorithm}, {stopping}, {search.mode}imum of "
        f"{search.metric}"
    )
    for name, domain in search.space.items():
        console.info(f"  {name}: {domain}")


def _trial_flags(spec: TuningSpec, survey: Survey, plan: Plan, console: Console) -> dict[str, Any]:
    """Return the flags that all trials share; hold groups out if there is no evaluation data."""
    from raybge.tuning.held_out_split import split_held_out
    from raybge.tuning.trial_spec import trial_flags

    if spec.validation:
        return trial_flags(spec, plan, None)
    split = split_held_out(survey, spec.held_out, spec.search.seed, spec.work)
    flags = trial_flags(spec, plan, split)
    console.info(
        f"held out: {split.held_out:,} of {split.held_out + split.trained:,} groups; their queries are evaluated "
        "against every `pos` and `neg` of the data"
    )
    return flags


# --- output folder ----------------------------------------------------------------------------------------------------


def search_identity(
    space: Mapping[str, Domain], settings: Mapping[str, Any], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything that a continued search must have in common with its beginning, without secrets.

    Args:
        space: domain of each searched flag.
        settings: flags of the search.
        flags: flags of all trials.

    Returns:
        JSON values in the parts "space", "search" and "trials".
    """
    domains = {name: str(domain) for name, domain in space.items()}
    return dict(redact_settings({"space": domains, "search": dict(settings), "trials": dict(flags)}))


def prepare_output(output: Path, resume: bool, identity: Mapping[str, Any]) -> None:
    """Remove an old search from the output folder, or check that it is the one to continue.

    Args:
        output: the output folder; files of other origin in it stay.
        resume: continue the search.
        identity: see `search_identity`.

    Raises:
        UserError: a setting differs from the search that is continued.
    """
    from raybge.tuning.ray_tune import NAME
    from raybge.tuning.tuning_results import BEST, RESULT_FILES, TRIALS

    path = output / STATE_FOLDER / SEARCH_FILE
    if resume and path.is_file():
        before, now = json.loads(path.read_text()), json.loads(json.dumps(identity))
        for part in now:
            for name in sorted({*before[part], *now[part]}):
                old, new = before[part].get(name), now[part].get(name)
                if old != new:
                    raise UserError(f"--resume: --{name} is {new}, but {old} in the search of {output}")
        return
    for folder in (TRIALS, BEST, f"{STATE_FOLDER}/{NAME}", f"{STATE_FOLDER}/{SHARED}"):
        shutil.rmtree(output / folder, ignore_errors=True)
    for name in RESULT_FILES:
        (output / name).unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(identity, indent=1) + "\n")
