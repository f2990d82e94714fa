"""Mining of hard negatives: read, deduplicate, encode, search, sample, write.

The steps of `mine` follow from top to bottom. Intermediate results are kept in a store, so that an interrupted run
continues; the output depends on the data alone, not on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import MineOptions
from raybge.cluster.resources import Cluster, Plan
from raybge.data.groups import near_key, parse_group, parse_passage
from raybge.data.survey import Survey
from raybge.language_model.chat_client import ChatClient
from raybge.mining.cross_encoder import CrossEncoderScorer, make_scorer, score_groups
from raybge.mining.hard_negatives import excluded_texts, mine_block
from raybge.mining.judge import judged_blocks
from raybge.mining.relabelling import RelabelStatistics
from raybge.mining.rescoring import Rescorer, rescore_candidates
from raybge.mining.results import (
    MiningResult,
    print_summary,
    relabelling_lines,
    report_path,
    write_mining_metadata,
    write_report,
)
from raybge.mining.sampling import SamplingSpec
from raybge.mining.spec import MiningSpec
from raybge.mining.statistics import MiningStatistics
from raybge.search.deduplication import deduplicate, find_shared_positives
from raybge.search.embedder import Embedder, make_embedder, with_export_dir
from raybge.search.index import ShardedIndex, build_index, report_recall, search
from raybge.search.inputs import open_inputs
from raybge.search.memory import SearchMemory
from raybge.search.pipeline import encode
from raybge.search.plan_lines import describe_data, describe_model
from raybge.search.search_data import Passages, Queries, SearchData, passages_of_group, single_passage
from raybge.search.spec import IndexSpec
from raybge.search.stage_clock import StageClock
from raybge.search.store import EncodedBlock, Store, run_store
from raybge.util.atomic_write import exists, open_atomic
from raybge.util.plural import plural


@dataclass(frozen=True)
class MiningRun:
    """A mining run after the cluster is connected and the inputs are surveyed."""

    spec: MiningSpec
    surveys: Sequence[Survey]
    cluster: Cluster
    plan: Plan
    index: IndexSpec  # with the place of the search decided
    store: Store
    clock: StageClock
    console: Console
    judge: ChatClient | None = None


def mine(
    options: MineOptions, console: Console, embedder: Embedder | None = None, exact: Embedder | None = None
) -> MiningResult:
    """Run the command.

    Args:
        options: the command's options.
        console: the console.
        embedder: makes the vectors instead of the model.
        exact: makes the vectors of --rescore instead of the model.

    Returns:
        The output file, its report, counts, and seconds of each stage.

    Raises:
        UserError: invalid flags, files or rows.
    """
    spec = MiningSpec.from_options(options, embedder is not None)
    finished = exists(spec.output.path, "--output_file")
    if finished and not spec.output.overwrite:
        console.info(f"{spec.output.path} exists already: nothing to do (--overwrite mines again)")
        return MiningResult(spec.output.path)
    with run_store(spec.output, "mine", finished, console) as store, ExitStack() as stack:
        model = spec.model and with_export_dir(spec.model, store.folder, spec.output.storage_path)
        exports = [model] if model and not spec.output.dry_run else []
        judge = stack.enter_context(_judge(spec, store, console))
        inputs = open_inputs(spec.inputs, spec.scale, store.folder, console, exports)
        cluster, surveys = stack.enter_context(inputs)
        plan = spec.scale.plan(cluster, cores_a_worker=1)
        index = spec.index
        if not spec.score_only:
            index = index.on_cluster(cluster, plan, spec.search_depth, "range_for_sampling")
        console.info(f"cluster: {cluster.describe()}; {plan.describe('actor')}")
        run = MiningRun(spec, surveys, cluster, plan, index, store, StageClock(), console, judge)
        scorer = make_scorer(spec.cross_encoder, spec.normalize_scores, store, plan) if spec.cross_encoder else None
        if spec.score_only:
            assert scorer is not None
            return _score_only(run, scorer)
        if embedder is None:
            assert model is not None
            embedder = make_embedder(model, plan)
            exact = make_embedder(model.in_fp32(), plan) if spec.rescore else None
        return _mine_negatives(run, embedder, exact, scorer)


@contextmanager
def _judge(spec: MiningSpec, store: Store, console: Console) -> Iterator[ChatClient | None]:
    """Provide the client of the judge, which accepts requests; None without a judge, and in a dry run."""
    if spec.judge is None or spec.output.dry_run:
        yield None
        return
    with ChatClient(spec.judge, store) as client:
        with console.phase("checking the judge"):
            client.check()
        yield client


def _mine_negatives(
    run: MiningRun, embedder: Embedder, exact: Embedder | None, scorer: CrossEncoderScorer | None
) -> MiningResult:
    """Deduplicate, plan, encode, search, rescore with the model `exact`, and write."""
    spec, clock, console = run.spec, run.clock, run.console
    with clock("deduplicate"), console.phase("removing duplicates"):
        data = _search_data(run, scorer is not None)
    clock.count("deduplicate", int(data.unique.total_B.sum()), "passage")
    sampling = _clipped_sampling(spec.sampling, data.unique.passages, console)
    memory = SearchMemory.plan(
        run.index, run.cluster, run.plan, data.unique.passages, embedder.dim, with_model=bool(scorer or exact)
    )
    _print_plan(run, data, memory, sampling)
    summary: dict[str, Any] = {
        "rows": data.queries.survey.total_rows,
        "passages": data.unique.passages,
        "duplicates": data.unique.duplicates,
        "bad_rows": sum(survey.bad_count for survey in run.surveys),
    }
    if spec.output.dry_run:
        return MiningResult.of(spec.output.path, summary)
    run.store.keep_on_failure = True
    with open_atomic(spec.output.path, "--output_file") as out:
        with clock("encode"):
            passages, queries = encode(data, embedder, run.store, run.plan, console)
        clock.count("encode", data.texts, "text")

        def indexed(on_actors: bool) -> ShardedIndex:
            with clock("index"), console.phase("building the index"):
                return build_index(
                    passages, run.store, run.index, run.plan, memory.resident_shards, process_on_actors=on_actors
                )

        rescorer = None
        if exact:
            index = indexed(on_actors=False)
            with clock("rescore"):
                rescorer = rescore_candidates(index, queries, spec.search_depth, exact, run.plan, console)
        with indexed(on_actors=bool(scorer or rescorer)) as index, clock("search"):
            statistics = _search_and_write(run, sampling, index, queries, scorer, rescorer, out)
            recall = report_recall(index, queries, sampling.hi, console)
        clock.count("search", summary["rows"], "row")
        summary |= {"rows_filled": statistics.rows_filled, "rows_with_fewer": statistics.rows_with_fewer, **recall}
        if exact:
            summary |= {"ranks_rescored": statistics.ranks_rescored, "ranks_changed": statistics.ranks_changed}
        summary |= statistics.relabelling.counts() if spec.relabel else {}
        write_mining_metadata(spec, embedder.identity, scorer, summary, statistics)
    summary |= {"seconds": clock.seconds, "output_file": spec.output.path}
    clock.report(console)
    write_report(spec, run.surveys, summary, statistics, sampling, statistics.relabelling)
    print_summary(summary, sampling, statistics, console, spec.relabel)
    return MiningResult.of(spec.output.path, summary)


def _search_data(run: MiningRun, has_scorer: bool) -> SearchData:
    """Return queries and deduplicated pool: the second input, or the groups' own passages if there is none."""
    groups, own_pool = run.surveys[0], len(run.surveys) == 1
    pool = (
        Passages(groups, parse_group, passages_of_group, near_key)
        if own_pool
        else Passages(run.surveys[1], parse_passage, single_passage, near_key)
    )
    shared = find_shared_positives(groups, parse_group, near_key, run.store)
    # in a pool of the groups' own passages the positives have vectors already
    encode_positives = (run.spec.sampling.by_margin or run.spec.keep_scores) and not has_scorer and not own_pool
    queries = Queries(groups, parse_group, excluded_texts, near_key, shared, encode_positives)
    return SearchData(pool, deduplicate(pool.survey, pool.parse, pool.texts, run.store), queries)


def _clipped_sampling(sampling: SamplingSpec, passages: int, console: Console) -> SamplingSpec:
    """Return the sampling limited to the pool's ranks, and print the limit if it applies."""
    clipped = sampling.clipped(passages)
    if clipped != sampling:
        console.info(
            f"--range_for_sampling {sampling.lo}-{sampling.hi} exceeds the pool of {plural(passages, 'passage')}: "
            f"{clipped.lo}-{clipped.hi} is used"
        )
    return clipped


def _print_plan(run: MiningRun, data: SearchData, memory: SearchMemory, sampling: SamplingSpec) -> None:
    if run.spec.model:
        run.console.info(describe_model(run.spec.model))
    run.console.info(describe_data(data, run.spec.index.shard_size))
    if place := run.index.describe_place():
        run.console.info(place)
    run.console.detail(memory.describe(data, sampling.hi))
    if run.spec.preset:
        run.console.info(run.spec.preset)
    run.console.info(f"sampling: {sampling.describe()}")
    _print_relabelling(run.spec, run.console)


def _print_relabelling(spec: MiningSpec, console: Console) -> None:
    if spec.relabel:
        by = f"the judge {spec.judge.model} at {spec.judge.url}" if spec.judge else "the cross-encoder"
        console.info(f"relabelling: negatives that {by} takes for positives are {spec.relabel.outcome}")


def _search_and_write(
    run: MiningRun,
    sampling: SamplingSpec,
    index: ShardedIndex,
    queries: Sequence[EncodedBlock],
    scorer: CrossEncoderScorer | None,
    rescorer: Rescorer | None,
    out: Any,
) -> MiningStatistics:
    """Search all queries and write their rows with negatives; return the statistics of all rows."""
    statistics = MiningStatistics()
    spec = run.spec
    extra = index.lookup(), sampling, scorer, spec.keep_scores, rescorer, spec.relabel
    on_actors, depth = scorer is not None or rescorer is not None, spec.search_depth if rescorer else sampling.hi
    blocks = search(index, queries, depth, mine_block, *extra, on_actors=on_actors)
    if run.judge and spec.judge and spec.relabel:
        blocks = judged_blocks(blocks, run.judge, spec.relabel, spec.judge.concurrency)
    with run.console.bar("search", sum(block.rows for block in queries), "row", start_up="loading the index") as bar:
        for mined in blocks:
            out.write(mined.lines)
            statistics.add(mined.statistics)
            bar.update(mined.statistics.rows)
    return statistics


def _score_only(run: MiningRun, scorer: CrossEncoderScorer) -> MiningResult:
    """Write each row with its cross-encoder scores and everything else unchanged."""
    spec, console, survey = run.spec, run.console, run.surveys[0]
    console.info(f"data: {plural(survey.total_rows, 'row')}; cross-encoder: {spec.options['cross_encoder']}")
    _print_relabelling(spec, console)
    summary: dict[str, Any] = {"rows": survey.total_rows, "bad_rows": survey.bad_count}
    summary["output_file"] = spec.output.path
    relabelling = RelabelStatistics()
    if spec.output.dry_run:
        return MiningResult.of(spec.output.path, summary)
    run.store.keep_on_failure = True
    with (
        open_atomic(spec.output.path, "--output_file") as out,
        run.clock("score"),
        console.bar("score", survey.total_rows, "row", start_up="starting workers, loading the model") as bar,
        closing(score_groups(survey, scorer, run.plan, spec.relabel)) as blocks,
    ):
        for lines, rows, counts in blocks:
            out.write(lines)
            relabelling.add(counts)
            bar.update(rows)
        summary |= relabelling.counts() if spec.relabel else {}
        write_mining_metadata(spec, None, scorer, summary, MiningStatistics())
    run.clock.count("score", survey.total_rows, "row")
    run.clock.report(console)
    summary |= {"seconds": run.clock.seconds}
    write_report(spec, [survey], summary, relabelling=relabelling)
    for line in relabelling_lines(spec.relabel, relabelling) if spec.relabel else ():
        console.info(line)
    console.info(f"written: {spec.output.path}\nreport: {report_path(spec.output.path)}")
    return MiningResult.of(spec.output.path, summary)
