"""Mine hard negatives: passages that the model ranks high for a query and that are not its answers.

    python -m raybge.mine --model_name_or_path BAAI/bge-small-en-v1.5 --input_file groups.jsonl \\
        --output_file groups_mined.jsonl --range_for_sampling 2-200 --negative_number 15
    python -m raybge.mine --score_only --cross_encoder BAAI/bge-reranker-base --input_file groups.jsonl \\
        --output_file groups_scored.jsonl
    python -m raybge.mine --help

From Python: `raybge.mine_hard_negatives(model_name_or_path=..., input_file=..., output_file=...)`.

What is done is kept beside the output, or under `--storage_path`: a run that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raybge.cli.console import Console
from raybge.cli.options import MineOptions
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.cluster.resources import Cluster, Plan
    from raybge.data.survey import Survey
    from raybge.mining.cross_encoder import Teacher
    from raybge.mining.sampling import Sampling
    from raybge.mining.statistics import Tally
    from raybge.search.deduplication import Kept
    from raybge.search.index import Index
    from raybge.search.pipeline import Embedder, Passages, Queries
    from raybge.search.session import Stages
    from raybge.search.store import Piece, Store


def mine(arguments: MineOptions, console: Console, embedder: Embedder | None = None) -> dict[str, Any]:
    """The command: check, read, plan, encode, search, sample and write, sum up.

    `embedder` makes the vectors in place of the model.
    """
    from raybge.cluster.resources import plan_workers
    from raybge.mining.spec import check, encoder_options, kind_of, sources_of, teacher_of
    from raybge.search.index import hold, say_recall
    from raybge.search.pipeline import encode
    from raybge.search.session import Stages, check_search, describe_model, embedder_of, opened, store_of_run
    from raybge.util import atomic_write as output

    sampling = check(arguments, embedder is not None)
    sources = sources_of(arguments)
    finished = output.exists(arguments.output_file, "--output_file")
    if finished and not arguments.overwrite:
        console.info(f"{arguments.output_file} is there already: nothing to do (--overwrite mines it anew)")
        return {"output_file": arguments.output_file, "already_there": True}
    options = encoder_options(arguments)
    model = "" if embedder or arguments.score_only else describe_model(options)
    stages = Stages()
    with (
        store_of_run(arguments, "mine", finished) as store,
        opened(arguments, sources, store.folder, console) as (cluster, surveys),
    ):
        check_search(arguments.use_gpu_for_searching, cluster, sampling.hi, "range_for_sampling")
        plan = plan_workers(
            cluster, arguments.num_workers, arguments.use_gpu, arguments.cpus_per_worker, cores_a_worker=1
        )
        console.info(f"cluster: {cluster.describe()}; {plan.describe('actor')}")
        teacher = teacher_of(arguments, store, plan)
        if arguments.score_only:
            return _score_only(arguments, surveys[0], teacher, plan, store, stages, console)
        embedder = embedder or embedder_of(options, plan)
        with stages("deduplicate"):
            queries, pool, kept = _parts(arguments, sampling, surveys, teacher, store)
        stages.count("deduplicate", int(kept.found_B.sum()), "passages")
        sampling = _clip(sampling, kept.passages, console)
        held = _say_plan(arguments, model, embedder.dim, sampling, queries, pool, kept, cluster, plan, console)
        summary: dict[str, Any] = {
            "rows": queries.survey.total_rows,
            "passages": kept.passages,
            "duplicates": kept.dropped,
            "bad_rows": sum(found.bad_count for found in surveys),
        }
        if arguments.dry_run:
            return {**summary, "dry_run": True}
        store.precious = True
        with output.written_aside(arguments.output_file, "--output_file") as out:
            with stages("encode"):
                passages, rows = encode(pool, kept, queries, embedder, store, plan, console)
            stages.count("encode", kept.passages + queries.survey.total_rows, "texts")
            with stages("index"):
                index = hold(passages, store, arguments.shard_size, plan, kind_of(arguments), held, teacher is not None)
            with index, stages("search"):
                tally = _search_and_write(arguments, sampling, index, rows, teacher, out, console)
                found = say_recall(index, rows, sampling.hi, arguments.search_batch_size, console)
            stages.count("search", queries.survey.total_rows, "rows")
            summary |= {"rows_filled": tally.filled, "rows_with_fewer": tally.short, **found}
            _write_meta(arguments, embedder.identity, teacher, summary, tally)
    summary |= {"seconds": stages.seconds, "output_file": arguments.output_file}
    stages.say(console)
    _write_report(arguments, surveys, summary, tally, sampling)
    _say_summary(summary, sampling, tally, console)
    return summary


# --- plan -------------------------------------------------------------------------------------------------


def _clip(sampling: Sampling, passages: int, console: Console) -> Sampling:
    lo, hi = sampling.lo, sampling.hi
    if lo >= passages:
        raise UserError(
            f"--range_for_sampling {lo}-{hi} leaves nothing: the pool holds {passages:,} passages, "
            f"so ranks end at {passages - 1:,}"
        )
    if hi > passages:
        console.info(
            f"--range_for_sampling {lo}-{hi} goes beyond the pool of {passages:,} passages: "
            f"{lo}-{passages} is what there is"
        )
    return replace(sampling, hi=min(hi, passages))


def _parts(
    arguments: MineOptions, sampling: Sampling, surveys: Sequence[Survey], teacher: Teacher | None, store: Store
) -> tuple[Queries, Passages, Kept]:
    """What is searched for; the pool: the second source, or without one the groups' own passages; and which of its
    passages come first of their text.
    """
    from raybge.data.groups import near_key, parse_group, parse_passage
    from raybge.mining.hard_negatives import not_negatives
    from raybge.search.deduplication import deduplicate, positives_elsewhere
    from raybge.search.pipeline import Passages, Queries, passage_itself, passages_of_group

    own = len(surveys) == 1
    pool = (
        Passages(surveys[0], parse_group, passages_of_group, near_key)
        if own
        else Passages(surveys[1], parse_passage, passage_itself, near_key)
    )
    elsewhere = positives_elsewhere(surveys[0], parse_group, near_key, store)
    # in a pool of their own the positives have vectors already
    needed = (sampling.by_margin or arguments.keep_scores) and not teacher and not own
    queries = Queries(surveys[0], parse_group, not_negatives, near_key, elsewhere, encode_positives=needed)
    return queries, pool, deduplicate(pool.survey, pool.parse, pool.texts, store)


def _say_plan(
    arguments: MineOptions,
    model: str,
    dim: int,
    sampling: Sampling,
    queries: Queries,
    pool: Passages,
    kept: Kept,
    cluster: Cluster,
    plan: Plan,
    console: Console,
) -> int:
    """Print the plan; how many shards a search actor holds at a time."""
    from raybge.mining.spec import kind_of
    from raybge.search.session import describe_data, describe_memory, shards_held

    kind = kind_of(arguments)
    size = min(arguments.shard_size, kept.passages)
    held = shards_held(cluster, plan, kind, size, dim, arguments.shards_per_actor)
    if model:
        console.info(model)
    console.info(describe_data(queries, pool, kept, arguments.shard_size))
    console.info(describe_memory(kept, queries, size, held, plan.workers, dim, sampling.hi))
    console.info(f"sampling: {sampling.describe()}")
    return held


# --- search, sample, write --------------------------------------------------------------------------------


def _search_and_write(
    arguments: MineOptions,
    sampling: Sampling,
    index: Index,
    pieces: list[Piece],
    teacher: Teacher | None,
    out: Any,
    console: Console,
) -> Tally:
    from raybge.mining.hard_negatives import sampled
    from raybge.mining.statistics import Tally
    from raybge.search.index import search

    tally = Tally()
    keep_scores = arguments.keep_scores
    given = index.lookup(), sampling, teacher, keep_scores
    with console.bar("search", sum(piece.rows for piece in pieces), "rows") as bar:
        for done in search(
            index, pieces, sampling.hi, arguments.search_batch_size, sampled, *given, on_hosts=teacher is not None
        ):
            out.write(done.lines)
            tally.add(done.tally)
            bar.update(done.tally.rows)
    return tally


def _score_only(
    arguments: MineOptions,
    survey: Survey,
    teacher: Teacher | None,
    plan: Plan,
    store: Store,
    stages: Stages,
    console: Console,
) -> dict[str, Any]:
    """Give each row its teacher's scores and leave all else as it is."""
    from raybge.mining.cross_encoder import rescore
    from raybge.mining.statistics import Tally
    from raybge.util import atomic_write as output

    assert teacher is not None
    console.info(f"data: {survey.total_rows:,} rows; cross-encoder: {arguments.cross_encoder}")
    summary = {"rows": survey.total_rows, "bad_rows": survey.bad_count, "output_file": arguments.output_file}
    if arguments.dry_run:
        return {**summary, "dry_run": True}
    store.precious = True
    with (
        output.written_aside(arguments.output_file, "--output_file") as out,
        stages("score"),
        console.bar("score", survey.total_rows, "rows") as bar,
    ):
        for lines, rows in rescore(survey, teacher, plan):
            out.write(lines)
            bar.update(rows)
        _write_meta(arguments, None, teacher, summary, Tally())
    stages.count("score", survey.total_rows, "rows")
    stages.say(console)
    summary |= {"seconds": stages.seconds}
    _write_report(arguments, [survey], summary)
    console.info(f"written: {arguments.output_file}, {_report_of(arguments.output_file)}")
    return summary


# --- afterwards -------------------------------------------------------------------------------------------


def _write_meta(
    arguments: MineOptions, embedder: str | None, teacher: Teacher | None, summary: dict[str, Any], tally: Tally
) -> None:
    """Beside the output: what it was made of and with. Nothing in it differs between two runs that give the same."""
    import dataclasses
    import json

    from raybge.report.run_details import library_versions
    from raybge.util import atomic_write as output
    from raybge.util.filesystem import extended
    from raybge.util.redaction import public_values

    about = {
        "options": public_values(dataclasses.asdict(arguments)),
        "embedder": embedder,
        "cross_encoder": teacher and teacher.identity,
        "counts": summary,
        "scores": tally.histograms(),
        "versions": library_versions(),
    }
    with output.written_aside(extended(arguments.output_file, ".meta.json"), "--output_file") as out:
        out.write((json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode())


def _write_report(
    arguments: MineOptions,
    surveys: Sequence[Survey],
    summary: dict[str, Any],
    tally: Tally | None = None,
    sampling: Sampling | None = None,
) -> None:
    """Beside the output: what a person looks at."""
    from raybge.cli.parser import given
    from raybge.mining import page as report
    from raybge.report.page import written
    from raybge.report.run_details import Run, library_versions

    def about() -> report.Mining:
        data = [each for found in surveys for each in found.rows_by_file().items()]
        return report.Mining(
            run=Run("mine", given(arguments), arguments.model_name_or_path or "", data, versions=library_versions()),
            tally=tally,
            number=arguments.negative_number,
            summary={name: value for name, value in summary.items() if isinstance(value, int)},
            seconds=summary["seconds"],
            sampling=sampling.describe() if sampling else "",
            scored_by="the cross-encoder" if arguments.cross_encoder else "the model",
        )

    written(report.write, _report_of(arguments.output_file), about)


def _report_of(output_file: str) -> str:
    from raybge.util.filesystem import extended

    return extended(output_file, ".report.html")


def _say_summary(summary: dict[str, Any], sampling: Sampling, tally: Tally, console: Console) -> None:
    from raybge.util.filesystem import extended

    console.info(
        f"{summary['rows']:,} rows; pool of {summary['passages']:,} passages ({summary['duplicates']:,} "
        f"duplicates dropped); bad rows left out: {summary['bad_rows']:,}"
    )
    why = "the pool has no more"
    if sampling.by_score:
        why = "neither the ranks nor random passages gave more that the scores asked for allow"
    console.info(
        f"rows filled up with random passages: {summary['rows_filled']:,}; rows with fewer than {sampling.number} "
        f"negatives, because {why}: {summary['rows_with_fewer']:,}"
    )
    for example in tally.examples:
        for name in ("query", "pos", "neg"):
            text = " ".join((example[name] if name != "neg" else next(iter(example["neg"]), "(none)")).split())
            console.info(f"  {name:<6} {text if len(text) <= 90 else text[:87] + '...'}")
    output = summary["output_file"]
    console.info(f"written: {output}, {extended(output, '.meta.json')}, {_report_of(output)}")
