"""Where the weights of a mixture come from: the models' losses on examples, or a search that measures mixtures."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.cli.console import Console
from raybge.cli.options import MergeOptions
from raybge.data.groups import RowError, parse_example, parse_group
from raybge.data.jsonl import Parse, Row, read_block
from raybge.data.source_files import list_files
from raybge.data.survey import IN_PROCESS_BYTES, named, survey
from raybge.merging.coefficient_search import Tasted, Weights, best, search
from raybge.merging.spec import METRIC
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.merging.methods import Cocktail


@dataclass(frozen=True)
class Found:
    """The weights of a mixture and what they come from: a loss for each model, or mixtures that were measured."""

    weights: list[float]
    losses: Sequence[float] = ()
    tasted: Sequence[Tasted] = ()


# --- weights from examples --------------------------------------------------------------------------------------------


def example_rows(arguments: MergeOptions, given: list[Any] | None, console: Console) -> list[Any]:
    """What the examples parse to; none where weights come from elsewhere. UserError for one that cannot be used."""
    parse: Parse = parse_group if arguments.model_type == "encoder" else parse_example
    if given is not None:
        rows = []
        for number, row in enumerate(given):
            try:
                rows.append(parse(row))
            except RowError as error:
                raise UserError(f'example_data[{number}]: "{error.field}" {error.expected}') from error
        if not rows:
            raise UserError("example_data is empty")
        return rows
    if arguments.example_data is None:
        return []
    files = list_files(arguments.example_data, "--example_data")
    found = survey(files, IN_PROCESS_BYTES, parse, arguments.on_bad_rows)
    if found.bad_count:
        console.info(f"--example_data: {found.bad_count:,} rows are left out\n{named(found)}")
    return [row.value for block in found.blocks for row in read_block(files, block, parse) if isinstance(row, Row)]


def scored(arguments: MergeOptions, names: Sequence[str], rows: list[Any], console: Console) -> Found:
    """Score the models on Ray, each in a task of its own, and weigh them by their losses."""
    from raybge.cluster.remote_calls import in_order
    from raybge.cluster.resources import connect, grown, plan_workers
    from raybge.cluster.shared_paths import check_shared
    from raybge.merging.example_loss import Examples, weights_of
    from raybge.search.vectors import device_of

    names_of = ("model_type", "batch_size", "max_input_length", "neg_number", "seed", "cache_dir", "trust_remote_code")
    examples = Examples(rows=rows, **{name: getattr(arguments, name) for name in names_of})
    wanted = arguments.num_workers, arguments.use_gpu, arguments.cpus_per_worker
    losses: list[float] = []
    with connect(arguments.address, arguments.verbose) as cluster:
        import ray

        cluster = grown(cluster, *wanted, console.info)
        check_shared(cluster, {}, {"--model_names_or_paths": names})
        plan = plan_workers(cluster, *wanted)
        console.info(f"cluster: {cluster.describe()}; {plan.describe('worker')}, each scores a model at a time")
        console.info(f"examples: {len(rows):,}, {arguments.batch_size} at a time")
        if arguments.dry_run:
            return Found([])
        score = ray.remote(Examples.loss).options(num_cpus=plan.cpus, num_gpus=plan.gpus)
        calls = [(score.remote, examples, name, plan.cpus, device_of(plan)) for name in names]
        with console.bar("score", len(names), "models") as bar:
            for loss in in_order(calls, plan.workers):
                losses.append(loss)
                bar.update(1)
    for name, loss in zip(names, losses, strict=True):
        if not math.isfinite(loss):
            raise UserError(f"--model_names_or_paths {name}: its loss on the examples is no number ({loss})")
    return Found(weights_of(losses, arguments.temperature), losses)


# --- weights from a search --------------------------------------------------------------------------------------------


def searched(arguments: MergeOptions, cocktail: Cocktail, console: Console) -> Found:
    """Measure mixtures on the target, and on the general set where there is one, and take the best."""
    quiet = Console()  # writes into the log: each mixture would else say its plan
    floor, models = arguments.general_floor, len(arguments.model_names_or_paths)
    with ExitStack() as stack:
        work = stack.enter_context(_work_folder(arguments))
        target = stack.enter_context(_judge(arguments, "search", work, quiet, console))
        general = stack.enter_context(_judge(arguments, "general", work, quiet, console)) if arguments.general else None
        if arguments.dry_run:
            return Found([])
        bar = stack.enter_context(console.bar("search", arguments.max_evaluations, "mixtures"))

        def measure(weights: Weights) -> Tasted:
            folder = work / "mixture"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            mix_into(arguments, cocktail, folder, weights, lambda: None)
            return Tasted(weights, target(str(folder)), general(str(folder)) if general else None)

        tasted: list[Tasted] = []
        for each in search(measure, models, arguments.max_evaluations, floor):
            tasted.append(each)
            chosen = best(tasted, floor)
            bar.set_postfix_str(f"{METRIC} {chosen.target:.4f}")
            bar.update(1)
    return Found(list(chosen.weights), tasted=tasted)


@contextmanager
def _work_folder(arguments: MergeOptions) -> Iterator[Path]:
    """Where the mixtures of a search lie while it runs."""
    beside = os.path.dirname(os.path.abspath(arguments.output_path)) if arguments.output_path else None
    place = arguments.storage_path or beside
    try:
        if place:
            os.makedirs(place, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".raybge-merge-", dir=place)
    except OSError as error:
        flag = "--storage_path" if arguments.storage_path else "--output_path"
        raise UserError(f"{flag}: {place} cannot be written ({error.strerror})") from error
    with folder as path:
        yield Path(path)


@contextmanager
def _judge(
    arguments: MergeOptions, name: str, work: Path, quiet: Console, console: Console
) -> Iterator[Callable[[str], float]]:
    """What gives a model's METRIC on the set of a flag; its corpus is that of NAME_corpus, or its own passages."""
    from raybge.cli.options import EvaluateOptions
    from raybge.evaluation.run import judged_data, measured
    from raybge.search.store import Store

    for flag in (name, f"{name}_corpus"):
        if given := getattr(arguments, flag):
            list_files(given, f"--{flag}")  # evaluation would name flags of its own
    corpus = getattr(arguments, f"{name}_corpus") or [_own_passages(arguments, name, work, console)]
    shared = ("num_workers", "use_gpu", "cpus_per_worker", "address", "on_bad_rows", "cache_dir", "trust_remote_code")
    asked = EvaluateOptions(
        model_name_or_path=arguments.model_names_or_paths[0],
        corpus_data=corpus,
        query_data=getattr(arguments, name),
        k=10,
        storage_path=str(work / name),
        **{flag: getattr(arguments, flag) for flag in shared},
    )
    with judged_data(asked, quiet) as (data, cluster):
        console.info(
            "--{}: {queries:,} queries, {corpus:,} passages; {}".format(name, cluster.describe(), **data.counts)
        )

        def value(model: str) -> float:
            store = Store(str(work / name / "vectors"))
            try:
                return measured(
                    replace(asked, model_name_or_path=model), replace(data, store=store), cluster, quiet
                ).result[METRIC]
            finally:
                store.remove()

        yield value


def _own_passages(arguments: MergeOptions, name: str, work: Path, console: Console) -> str:
    """A file of every `pos` and `neg` of a flag's rows."""
    from raybge.evaluation.eval_data import BLOCK_BYTES, parse_pool
    from raybge.search.pipeline import passages_of_group

    files = list_files(getattr(arguments, name), f"--{name}")
    found = survey(files, BLOCK_BYTES, parse_pool, arguments.on_bad_rows)
    if found.bad_count:
        console.info(f"--{name}: {found.bad_count:,} rows are left out\n{named(found)}")
    path = work / f"{name}-corpus.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for block in found.blocks:
            for row in read_block(files, block, parse_pool):
                if isinstance(row, Row):
                    out.writelines(json.dumps({"text": text}) + "\n" for text in passages_of_group(row.value))
    return str(path)


# --- a mixture --------------------------------------------------------------------------------------------------------


def mix_into(
    arguments: MergeOptions, cocktail: Cocktail, folder: Path, weights: Sequence[float], done: Callable[[], Any]
) -> None:
    """Write a mixture's folder but for its card and page. UserError where it does not fit."""
    try:
        cocktail.write(folder, weights, arguments.merge_method, arguments.ties_density, done)
    except OSError as error:  # the disk is full
        raise UserError(f"the mixture cannot be written to {folder.parent} ({error.strerror or error})") from error
