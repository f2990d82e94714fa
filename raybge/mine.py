"""Mine hard negatives: passages that the model ranks high for a query and that are not its answers.

    python -m raybge.mine --model_name_or_path BAAI/bge-small-en-v1.5 --input_file groups.jsonl \\
        --output_file groups_mined.jsonl --range_for_sampling 2-200 --negative_number 15
    python -m raybge.mine --help

From Python: `raybge.mine_hard_negatives(model_name_or_path=..., input_file=..., output_file=...)`.

Letters in array names: Q rows, K ranks, N known passages of all rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raybge import cli
from raybge.arguments import MineArguments
from raybge.errors import UserError
from raybge.flags import build
from raybge.screen import Screen

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from raybge.data.groups import Group
    from raybge.data.survey import Survey
    from raybge.search.index import Index
    from raybge.search.inputs import Source
    from raybge.search.pipeline import Passages, Piece, Queries


def mine_hard_negatives(**flags: Any) -> dict[str, Any]:
    """Mine hard negatives; the arguments are the command's flags. Returns the summary.

    Raises UserError, before any model loads, for flags, files or rows that cannot be used.
    """
    arguments = build(MineArguments, flags)
    screen = Screen()
    with screen.capture("mine", enabled=not arguments.verbose):
        return mine(arguments, screen)


def mine(arguments: MineArguments, screen: Screen) -> dict[str, Any]:
    """The command: check, read, plan, encode, search, sample and write, sum up."""
    from raybge import output
    from raybge.cluster import plan_workers
    from raybge.search.index import hold
    from raybge.search.inputs import Stages, check_search, describe_data, describe_model, opened
    from raybge.search.pipeline import deduplicate, encode

    lo, hi = _check(arguments)
    sources = _sources(arguments)
    if output.exists(arguments.output_file, "--output_file") and not arguments.overwrite:
        screen.say(f"{arguments.output_file} is there already: nothing to do (--overwrite mines it anew)")
        return {"output_file": arguments.output_file, "already_there": True}
    options = _encoder_options(arguments)
    model = describe_model(options)
    stages = Stages()
    with opened(arguments, sources, screen) as (cluster, surveys):
        queries, pool = _parts(surveys)
        check_search(arguments.use_gpu_for_searching, cluster, hi, "range_for_sampling")
        plan = plan_workers(
            cluster, arguments.num_workers, arguments.use_gpu, arguments.cpus_per_worker, cores_a_worker=1
        )
        with stages("deduplicate"):
            kept = deduplicate(pool)
        stages.count("deduplicate", len(kept.keep_P), "passages")
        hi = _clip(lo, hi, kept.passages, screen)
        sampling = Sampling(lo, hi, arguments.negative_number, arguments.seed)
        screen.say(f"cluster: {cluster.describe()}; {plan.describe('actor')}")
        screen.say(model)
        screen.say(describe_data(queries, pool, kept, arguments.shard_size))
        screen.say(f"sampling: {sampling.describe()}")
        summary: dict[str, Any] = {
            "rows": queries.survey.total_rows,
            "passages": kept.passages,
            "duplicates": kept.dropped,
            "bad_rows": sum(found.bad_count for found in surveys),
        }
        if arguments.dry_run:
            return {**summary, "dry_run": True}
        with output.written_aside(arguments.output_file, "--output_file") as out:
            with stages("encode"):
                passages, rows = encode(pool, kept, queries, options, plan, screen)
            stages.count("encode", kept.passages + queries.survey.total_rows, "texts")
            gpus = cluster.gpus if arguments.use_gpu_for_searching else 0
            with stages("index"):
                index = hold(passages, arguments.shard_size, plan, gpus)
            with index, stages("search"):
                summary |= _search_and_write(arguments, sampling, index, rows, out, screen)
            stages.count("search", queries.survey.total_rows, "rows")
    summary |= {"seconds": stages.seconds, "output_file": arguments.output_file}
    stages.say(screen)
    _say_summary(summary, arguments.negative_number, screen)
    return summary


# --- check ------------------------------------------------------------------------------------------------


def _check(arguments: MineArguments) -> tuple[int, int]:
    """UserError for flags that cannot be; the range of ranks."""
    from raybge.model.folder import Instructions, check_model_folder
    from raybge.search.inputs import check_numbers

    check_numbers(
        arguments,
        "negative_number",
        "search_batch_size",
        "shard_size",
        "batch_size",
        "embedder_query_max_length",
        "embedder_passage_max_length",
    )
    if arguments.seed < 0:
        raise UserError(f"--seed must be at least 0, found {arguments.seed}")
    Instructions(
        query_format=arguments.query_instruction_format_for_retrieval,
        passage_format=arguments.passage_instruction_format_for_retrieval,
    )
    if arguments.output_file.endswith(".parquet"):
        raise UserError(f"--output_file {arguments.output_file}: groups are written as .jsonl, .jsonl.gz or .jsonl.zst")
    check_model_folder(arguments.model_name_or_path, "--model_name_or_path")
    text = arguments.range_for_sampling
    match = re.fullmatch(r"(\d+)-(\d+)", text.strip())
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(
            "--range_for_sampling takes two ranks lo-hi with lo below hi, such as 2-200 (0-based, lo to "
            f"hi-1), found «{text}»"
        )
    return int(match[1]), int(match[2])


def _sources(arguments: MineArguments) -> list[Source]:
    from raybge.data.files import list_files
    from raybge.data.groups import parse_group, parse_passage
    from raybge.search.inputs import Source, check_apart

    sources = [Source(list_files(arguments.input_file, "--input_file"), "--input_file", parse_group)]
    if arguments.candidate_pool:
        flag = "--candidate_pool"
        sources.append(Source(list_files(arguments.candidate_pool, flag), flag, parse_passage))
    check_apart(arguments.output_file, "--output_file", sources)
    return sources


def _clip(lo: int, hi: int, passages: int, screen: Screen) -> int:
    if lo >= passages:
        raise UserError(
            f"--range_for_sampling {lo}-{hi} leaves nothing: the pool holds {passages:,} passages, "
            f"so ranks end at {passages - 1:,}"
        )
    if hi > passages:
        screen.say(
            f"--range_for_sampling {lo}-{hi} goes beyond the pool of {passages:,} passages: "
            f"{lo}-{passages} is what there is"
        )
    return min(hi, passages)


# --- plan -------------------------------------------------------------------------------------------------


def _parts(surveys: Sequence[Survey]) -> tuple[Queries, Passages]:
    """What is searched for, and the pool: the second source, or without one the groups' own passages."""
    from raybge.data.groups import parse_group, parse_passage
    from raybge.search.pipeline import Passages, Queries, passage_itself, passages_of_group

    queries = Queries(surveys[0], parse_group, not_negatives)
    if len(surveys) == 2:
        return queries, Passages(surveys[1], parse_passage, passage_itself)
    return queries, Passages(surveys[0], parse_group, passages_of_group)


def not_negatives(group: Group) -> Sequence[str]:
    """The texts that are never a row's negatives."""
    return (*group.pos, group.query)


def _encoder_options(arguments: MineArguments) -> dict[str, Any]:
    name = arguments.model_name_or_path
    return {
        "model_name_or_path": os.path.abspath(name) if os.path.exists(name) else name,
        "normalize_embeddings": arguments.normalize_embeddings,
        "use_fp16": arguments.use_fp16,
        "query_instruction_for_retrieval": arguments.query_instruction_for_retrieval,
        "query_instruction_format": arguments.query_instruction_format_for_retrieval,
        "passage_instruction_for_retrieval": arguments.passage_instruction_for_retrieval,
        "passage_instruction_format": arguments.passage_instruction_format_for_retrieval,
        "pooling_method": arguments.pooling_method,
        "trust_remote_code": arguments.trust_remote_code,
        "cache_dir": arguments.cache_dir,
        "batch_size": arguments.batch_size,
        "query_max_length": arguments.embedder_query_max_length,
        "passage_max_length": arguments.embedder_passage_max_length,
    }


# --- search, sample, write --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """Ranks [lo, hi) of the full ranking, how many negatives, and the seed."""

    lo: int
    hi: int
    number: int
    seed: int

    def describe(self) -> str:
        """For the plan."""
        return f"{self.number} negatives a row from ranks {self.lo} to {self.hi - 1}, seed {self.seed}"


def _search_and_write(
    arguments: MineArguments,
    sampling: Sampling,
    index: Index,
    pieces: list[Piece],
    out: Any,
    screen: Screen,
) -> dict[str, int]:
    from raybge.search.index import search

    filled = short = 0
    with screen.bar("search", sum(piece.rows for piece in pieces), "rows") as bar:
        batch = arguments.search_batch_size
        for done in search(index, pieces, sampling.hi, batch, sampled, index, sampling):
            out.write(done.lines)
            filled, short = filled + done.filled, short + done.short
            bar.update(done.rows)
    return {"rows_filled": filled, "rows_with_fewer": short}


@dataclass(frozen=True)
class Sampled:
    """Output lines of one block, and how many of its rows got random passages, or fewer than asked for."""

    lines: bytes
    rows: int
    filled: int
    short: int


def sampled(table: pa.Table, ids_QK: np.ndarray, known_N: np.ndarray, index: Index, sampling: Sampling) -> Sampled:
    """Draw the negatives of each row of an encoded block. A row's seed is its own place in the input."""
    import json

    import numpy as np

    from raybge.search.sampling import draw
    from raybge.search.shards import keys_of

    ends = np.cumsum(keys_of(table)[1])
    drawn, filled = [], 0
    places = zip(table["file"].to_pylist(), table["offset"].to_pylist(), strict=True)
    for row, (place, banned) in enumerate(zip(places, np.split(known_N, ends[:-1]), strict=True)):
        rng = np.random.default_rng([sampling.seed, *place])
        # the range is cut out of the full ranking first, what must not be in it is dropped afterwards
        candidates = ids_QK[row, sampling.lo : sampling.hi]
        ids, fills = draw(candidates, banned, sampling.number, index.passages, rng)
        drawn.append(ids.tolist())
        filled += fills > 0
    texts = index.texts(np.array([i for ids in drawn for i in ids], np.int64))
    lines = []
    for text, ids in zip(table["text"].to_pylist(), drawn, strict=True):
        row = json.loads(text)
        row["neg"] = [texts[i] for i in ids]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    short = sum(len(ids) < sampling.number for ids in drawn)
    return Sampled("".join(lines).encode(), len(lines), filled, short)


def _say_summary(summary: dict[str, Any], number: int, screen: Screen) -> None:
    screen.say(
        f"{summary['rows']:,} rows; pool of {summary['passages']:,} passages ({summary['duplicates']:,} "
        f"duplicates dropped); bad rows left out: {summary['bad_rows']:,}"
    )
    screen.say(
        f"rows filled up with random passages: {summary['rows_filled']:,}; rows with fewer than {number} "
        f"negatives, because the pool has no more: {summary['rows_with_fewer']:,}"
    )
    screen.say(f"written: {summary['output_file']}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(MineArguments, mine, "mine", argv)


if __name__ == "__main__":
    raise SystemExit(main())
