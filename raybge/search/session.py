"""What the search commands share around their work: checks, connecting, lines of the plan, clocks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import CommonOptions
from raybge.cluster.resources import Cluster, Plan, connect, grown
from raybge.cluster.shared_paths import check_shared
from raybge.data.jsonl import Parse
from raybge.data.ray_datasets import transcode
from raybge.data.source_files import SourceFile
from raybge.data.survey import IN_PROCESS_BYTES, Survey, named, survey
from raybge.model.folder import read_settings, vector_width
from raybge.search.deduplication import MOST_KNOWN, Kept
from raybge.search.model_identity import model_identity
from raybge.search.pipeline import Embedder, Passages, Queries
from raybge.search.shards import GPU_MOST, KEY_BYTES, TIE_MARGIN, Kind, check_gpu_search
from raybge.search.store import Store, digest
from raybge.util.errors import UserError
from raybge.util.filesystem import extended, filesystem
from raybge.util.redaction import public
from raybge.util.versions import RAYBGE

BLOCK_BYTES = 256 << 10  # of the input: what is read, encoded and searched for together, at least
MODELS = ("model_name_or_path", "cross_encoder")  # flags of the search commands that may name a folder
OUTPUTS = ("output_file", "metrics_file", "run_file")  # and a file to write
MEMORY_SHARE = 0.8  # of what Ray counts as an actor's memory, for vectors
WIDE = 1024  # vectors of a model whose configuration does not say
MOST_BLOCKS = 32_768  # the driver holds a name and some numbers of each


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

    def say(self, console: Console) -> None:
        """The table of stages."""
        rows = []
        for name, seconds in self.seconds.items():
            done, unit = self._done.get(name, (0, ""))
            rate = f"{done / max(seconds, 1e-3):,.0f}" if unit else ""
            rows.append((name, f"{done:,} {unit}" if unit else "", f"{seconds:,.1f}", rate))
        console.table(("stage", "done", "seconds", "a second"), rows)


def check_numbers(arguments: CommonOptions, *names: str) -> None:
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
    return public(path) if "://" in path else os.path.realpath(filesystem(path)[1])


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
def work_folder(storage_path: str | None, name: str, otherwise: str | None = None) -> Iterator[str]:
    """Where a command keeps its work: folder `name` of the storage path; without one `otherwise`, or a temporary folder
    of this machine that is removed afterwards.
    """
    if storage_path or otherwise:
        yield extended(storage_path, f"/{name}") if storage_path else str(otherwise)
    else:
        with TemporaryDirectory(prefix=f"raybge-{name}-") as folder:
            yield folder


@contextmanager
def store_of_run(arguments: Any, name: str, finished: bool) -> Iterator[Store]:
    """The store of a run that writes `--output_file`, which is `finished` or not.

    It is removed when the run is over, unless it has a place of its own; of a run that fails it stays, once anything in
    it is worth keeping.
    """
    with work_folder(arguments.storage_path, name, extended(arguments.output_file, ".work")) as folder:
        store = Store(folder)
        # Beside an output there is only the work of a run that was to overwrite it: this one continues it.
        if arguments.overwrite and not (finished or arguments.dry_run or arguments.storage_path):
            store.remove()
        store.precious = store.exists() or bool(arguments.storage_path)
        try:
            yield store
            store.precious = bool(arguments.storage_path) or (store.precious and arguments.dry_run)
        finally:
            if not store.precious:
                store.remove()


@contextmanager
def opened(
    arguments: CommonOptions, sources: Sequence[Source], work: str, console: Console
) -> Iterator[tuple[Cluster, list[Survey]]]:
    """The Ray cluster and the surveyed sources; small ones are surveyed before Ray starts.

    Packed files are unpacked under `work`. UserError where a node does not see what is read or written.
    """
    small = sum(file.size for source in sources for file in source.files) <= IN_PROCESS_BYTES
    with ExitStack() as stack:
        surveys = small and [surveyed(source, work, arguments.on_bad_rows, console) for source in sources]
        cluster = stack.enter_context(connect(arguments.address, arguments.verbose))
        wanted = arguments.num_workers, arguments.use_gpu, arguments.cpus_per_worker
        cluster = grown(cluster, *wanted, console.info)
        models = {f"--{name}": [getattr(arguments, name, None)] for name in MODELS}
        written = {f"--{name}": getattr(arguments, name, None) for name in OUTPUTS}
        read = {source.flag: [file.path for file in source.files] for source in sources}
        check_shared(cluster, {**written, "--storage_path": work}, {**read, **models})
        yield cluster, surveys or [surveyed(source, work, arguments.on_bad_rows, console) for source in sources]


def surveyed(source: Source, work: str, on_bad_rows: str, console: Console) -> Survey:
    files = transcode(source.files, extended(work, "/unpacked"))
    block_bytes = max(BLOCK_BYTES, -(-sum(file.size for file in files) // MOST_BLOCKS))
    cache = None if "://" in work else f"{work}/surveys"
    found = survey(files, block_bytes, source.parse, on_bad_rows, cache)
    if found.bad_count:
        console.info(f"{source.flag}: {found.bad_count:,} rows are left out\n{named(found)}")
    return found


def embedder_of(options: dict[str, Any], plan: Plan) -> Embedder:
    """What makes the vectors of an Encoder with these options; on a GPU they are others than on a CPU."""
    name = options["model_name_or_path"], options["cache_dir"]
    identity = digest(RAYBGE, model_identity(*name), options, plan.gpus)
    return Embedder(partial(_encoder, options, plan.cpus), identity, vector_width(*name) or WIDE)


def _encoder(options: dict[str, Any], threads: int, device: str) -> Any:
    import torch

    from raybge.model.encoder import Encoder

    torch.set_num_threads(threads)
    return Encoder(**options, devices=device)


def shards_held(cluster: Cluster, plan: Plan, kind: Kind, shard_size: int, dim: int, asked: int | None) -> int:
    """Shards that a search actor has in memory at a time: what was asked for, else what the memory carries.

    UserError where the memory does not carry one.
    """
    if asked:
        return asked
    one = shard_size * dim * (2 if kind.gpu else 4)
    room = (_gpu_memory() if kind.gpu else cluster.memory / plan.workers) * MEMORY_SHARE
    if one > room > 0:
        raise UserError(
            f"--shard_size {shard_size:,}: a shard of vectors of {dim} numbers takes {one / 1e9:.1f} GB, and a search "
            f"actor has {room / 1e9:.1f}; ask for smaller shards"
        )
    return max(1, int(room // one))


def _gpu_memory() -> int:
    """Bytes of the smallest GPU that a task meets."""
    import ray

    def look() -> int:
        import torch

        return int(torch.cuda.mem_get_info()[1])

    return int(ray.get(ray.remote(look).options(num_gpus=1).remote()))


def check_search(gpu: bool, cluster: Cluster, most: int, flag: str) -> None:
    """UserError where a search for `most` candidates cannot run on the GPU as asked."""
    if gpu:
        check_gpu_search(cluster.gpus)
    if gpu and most > GPU_MOST:
        raise UserError(f"--{flag} asks for {most:,} candidates: with --use_gpu_for_searching at most {GPU_MOST:,}")


def describe_data(queries: Queries, pool: Passages, kept: Kept, shard_size: int) -> str:
    """The plan line on what is searched for in what."""
    files, shards = len(queries.survey.files), -(-kept.passages // shard_size)
    cut = queries.elsewhere.cut if queries.elsewhere else 0
    more = f"; {cut:,} rows ask what {MOST_KNOWN:,} positives or more answer: others beyond these may be mined"
    return (
        f"data: {queries.survey.total_rows:,} rows in {files:,} file{'s' * (files != 1)}; pool of "
        f"{kept.passages:,} passages ({kept.dropped:,} duplicates dropped) in {shards:,} "
        f"shard{'s' * (shards != 1)}{more if cut else ''}"
    )


def describe_memory(kept: Kept, queries: Queries, shard_size: int, held: int, actors: int, dim: int, k: int) -> str:
    """The plan line on what a process holds at most, beside its libraries and the model."""
    shards = -(-kept.passages // shard_size)
    actors = min(actors, shards)
    mine, size = -(-shards // actors), min(shard_size, kept.passages)
    vectors, keys = min(held, mine) * size * dim * 4, mine * size * KEY_BYTES
    lists = 2 * 40 * int(queries.survey.rows.max()) * (k + TIE_MARGIN)  # two that are merged, and their order
    passes = -(-mine // held)
    return (
        f"memory: a search actor holds {min(held, mine):,} of its {mine:,} shard{'s' * (mine != 1)} at a time: "
        f"{vectors / 1e6:,.0f} MB of vectors, {keys / 1e6:,.0f} MB of keys, {lists / 1e6:,.1f} MB of lists; "
        f"{passes:,} pass{'es' * (passes != 1)} over the queries; an encoding actor holds one block of "
        f"{int(kept.kept_B.max()):,} passages at most"
    )
