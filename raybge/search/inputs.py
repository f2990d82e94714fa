"""What the search commands share around their work: checks, connecting, lines of the plan, clocks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

from raybge.arguments import CommonArguments
from raybge.cluster import Cluster, connect
from raybge.data.files import SourceFile, filesystem
from raybge.data.jsonl import Parse
from raybge.data.source import transcode
from raybge.data.survey import IN_PROCESS_BYTES, Survey, named, survey
from raybge.errors import UserError
from raybge.model.folder import read_settings
from raybge.screen import Screen
from raybge.search.pipeline import Kept, Passages, Queries
from raybge.search.shards import GPU_MOST, check_gpu_search

BLOCK_BYTES = 256 << 10  # of the input: what is read, encoded and searched for together


@dataclass(frozen=True)
class Source:
    """Files as a flag names them, and how a row of theirs is parsed."""

    files: list[SourceFile]
    flag: str
    parse: Parse


class Stages:
    """How long each stage took, and how much it did."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._done: dict[str, tuple[int, str]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)

    def count(self, name: str, done: int, unit: str) -> None:
        self._done[name] = done, unit

    def say(self, screen: Screen) -> None:
        """The table of stages."""
        rows = []
        for name, seconds in self.seconds.items():
            done, unit = self._done.get(name, (0, ""))
            rate = f"{done / max(seconds, 1e-3):,.0f}" if unit else ""
            rows.append((name, f"{done:,} {unit}" if unit else "", f"{seconds:,.1f}", rate))
        screen.table(("stage", "done", "seconds", "a second"), rows)


def check_numbers(arguments: CommonArguments, *names: str) -> None:
    """UserError for a flag that is below 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}")


def check_apart(path: str, flag: str, sources: Sequence[Source]) -> None:
    """UserError where a file to write is one that is read."""
    for source in sources:
        for file in source.files:
            if _place(file.name) == _place(path):
                raise UserError(f"{flag} {path} is a file that {source.flag} reads; give it another name")


def _place(path: str) -> str:
    return path if "://" in path else os.path.realpath(filesystem(path)[1])


def describe_model(options: dict[str, Any]) -> str:
    """The plan line on how texts become vectors, and who says so; `options` are the Encoder's."""
    settings = read_settings(options["model_name_or_path"], options["cache_dir"])
    chosen = options["pooling_method"], options["normalize_embeddings"]
    pooling = chosen[0] or settings.pooling
    normalize = settings.normalize if chosen[1] is None else chosen[1]
    folder = "the model's folder" if settings.source == "modules.json" else "defaults: the folder does not say"
    source = "flags" if None not in chosen else folder if chosen == (None, None) else f"flags and {folder}"
    lengths = [
        f"{texts} up to {options[f'{name}_max_length'] or settings.max_length or 'all that fit'} tokens"
        for texts, name in (("queries", "query"), ("passages", "passage"))
    ]
    return (
        f"model: {options['model_name_or_path']}, {pooling} pooling, {'' if normalize else 'not '}normalised "
        f"({source}), {', '.join(lengths)}"
    )


@contextmanager
def opened(
    arguments: CommonArguments, sources: Sequence[Source], screen: Screen
) -> Iterator[tuple[Cluster, list[Survey]]]:
    """The Ray cluster and the surveyed sources; small ones are surveyed before Ray starts.

    Packed files are unpacked under `storage_path`, or without one in a temporary folder of this machine.
    """
    small = sum(file.size for source in sources for file in source.files) <= IN_PROCESS_BYTES
    with ExitStack() as stack:
        cluster = None if small else stack.enter_context(connect(arguments.address, arguments.verbose))
        if arguments.storage_path:
            folder = f"{arguments.storage_path.rstrip('/')}/unpacked"
        else:
            folder = stack.enter_context(TemporaryDirectory(prefix="raybge-unpacked-"))
        surveys = [_surveyed(source, folder, arguments.on_bad_rows, screen) for source in sources]
        cluster = cluster or stack.enter_context(connect(arguments.address, arguments.verbose))
        _check_unpacked(cluster, arguments.storage_path, sources)
        yield cluster, surveys


def _surveyed(source: Source, folder: str, on_bad_rows: Any, screen: Screen) -> Survey:
    found = survey(transcode(source.files, folder), BLOCK_BYTES, source.parse, on_bad_rows)
    if found.bad_count:
        screen.say(f"{source.flag}: {found.bad_count:,} rows are left out\n{named(found)}")
    return found


def _check_unpacked(cluster: Cluster, storage_path: str | None, sources: Sequence[Source]) -> None:
    packed = [file.name for source in sources for file in source.files if file.kind in ("gzip", "zstd", "array")]
    if cluster.nodes > 1 and packed and not storage_path:
        raise UserError(
            f"--storage_path: {packed[0]} cannot be read from the middle and has to be unpacked; name a "
            f"folder or URI that all {cluster.nodes} nodes see, or unpack it yourself"
        )


def check_search(gpu: bool, cluster: Cluster, most: int, flag: str) -> None:
    """UserError where a search for `most` candidates cannot run on the GPU as asked."""
    if gpu:
        check_gpu_search(cluster.gpus)
    if gpu and most > GPU_MOST:
        raise UserError(f"--{flag} asks for {most:,} candidates: with --use_gpu_for_searching at most {GPU_MOST:,}")


def describe_data(queries: Queries, pool: Passages, kept: Kept, shard_size: int) -> str:
    """The plan line on what is searched for in what."""
    files, shards = len(queries.survey.files), -(-kept.passages // shard_size)
    return (
        f"data: {queries.survey.total_rows:,} rows in {files:,} file{'s' * (files != 1)}; pool of "
        f"{kept.passages:,} passages ({kept.dropped:,} duplicates dropped) in {shards:,} "
        f"shard{'s' * (shards != 1)}"
    )
