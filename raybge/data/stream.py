"""Stream of one training worker: the rows of its lanes in order, as one batch per step.

Rows are read by Ray Data, or by a thread of the worker if there are few.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from raybge.data.jsonl import Block, Parse, Row, read_rows
from raybge.data.mixture import Span
from raybge.data.order import Order, Window
from raybge.data.ray_datasets import BlockRead, dataset_of_reads
from raybge.data.source_files import SourceFile, open_stream
from raybge.data.survey import Survey
from raybge.data.token_cache import TokenCache
from raybge.util.errors import UserError

# Size of the blocks in which steps leave a reading task. Small, so that a step waits for few others: a step of a large
# batch is a block of its own.
STREAM_BYTES = 64 << 10
PREFETCHED_STEPS = 4


class Batch(Protocol):
    """One worker's share of a step."""

    @property
    def step(self) -> int:
        """Number of the step within the epoch."""

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(file, offset) of each row."""

    @property
    def token_ids(self) -> list[np.ndarray]:
        """Token ids of each text."""

    def numel(self) -> int:
        """Return the number of tokens."""


class StepTokenizer(Protocol):
    """Conversion of a step's rows to its batch: a table in the reading task, and from it the batch in the worker."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of the table."""

    @property
    def parse(self) -> Parse:
        """Function that makes the value of a row from its fields."""

    def __call__(self, epoch: int, step: int, rows: Sequence[Row], copies: Sequence[int] | None = None) -> pa.Table:
        """Return the step as a table of one row.

        Args:
            epoch: number of the epoch.
            step: number of the step within the epoch.
            rows: rows of the worker's share.
            copies: for each row how often the epoch had it before; default: 0.

        Returns:
            The table.
        """

    def unpack(self, table: pa.Table) -> Batch:
        """Return the batch of a table of one row."""


def read_with_ray(stream: StepStream) -> Iterator[pa.Table]:
    """Read the steps of a stream's epoch with a Ray Data pipeline of its own.

    Args:
        stream: the stream; `reading_cpus` limits the pipeline.

    Returns:
        Iterator over the steps, each as the tokenizer's table of one row.
    """
    import ray
    from ray.data import ExecutionResources

    shared = ray.put(StepReader.of(stream.survey, stream.order, stream.tokenizer, stream.token_cache))
    # A task consists of a few numbers: it computes itself what its window reads.
    reads = [
        BlockRead(
            functools.partial(
                _read_shared, shared, stream.epoch, stream.rank, stream.world, max(first, stream.start_step)
            )
        )
        for first, _ in stream.order.window_bounds(stream.start_step)
    ]
    cpus = {"num_cpus": min(1.0, stream.reading_cpus)}
    dataset = dataset_of_reads(reads, stream.tokenizer.schema, STREAM_BYTES, cpus)
    dataset.context.execution_options.resource_limits = ExecutionResources(cpu=stream.reading_cpus)
    dataset.context.enable_progress_bars = False
    tables: Iterator[pa.Table] = iter(
        dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=PREFETCHED_STEPS)
    )
    return tables


def read_in_process(stream: StepStream) -> Iterator[pa.Table]:
    """Read the steps of a stream's epoch in a thread of this process.

    For little data on few cores: it saves the seconds, the CPU time and the memory of Ray Data's processes.

    Args:
        stream: the stream.

    Yields:
        The steps, each as the tokenizer's table of one row.
    """
    # A tokenizer serves one thread at a time, and an evaluation may use it meanwhile.
    tokenizer = copy.deepcopy(stream.tokenizer)
    reader = StepReader.of(stream.survey, stream.order, tokenizer, stream.token_cache)
    tables = itertools.chain.from_iterable(
        reader.tables(stream.epoch, stream.rank, stream.world, max(first, stream.start_step))
        for first, _ in stream.order.window_bounds(stream.start_step)
    )
    with ThreadPoolExecutor(1, "reading") as thread:
        pending = deque(thread.submit(next, tables, None) for _ in range(PREFETCHED_STEPS))
        while (table := pending.popleft().result()) is not None:
            pending.append(thread.submit(next, tables, None))
            yield table


@dataclass
class StepStream:
    """Iterable over the steps of an epoch for one worker.

    transformers' Trainer reads the number of steps from `len()` and the number of samples from the length of `dataset`.

    Args:
        survey: the surveyed data.
        order: order of the epochs.
        tokenizer: makes the batches.
        rank: number of the worker.
        world: number of workers.
        reading_cpus: CPUs of this worker's reading tasks.
        epoch: the epoch to iterate over.
        start_step: first step to yield.
        token_cache: steps in it are not tokenized again.
        read_tables: reads the steps of the stream's epoch from `start_step` on.
    """

    survey: Survey
    order: Order
    tokenizer: StepTokenizer
    rank: int
    world: int
    reading_cpus: float
    epoch: int = 0
    start_step: int = 0
    token_cache: TokenCache | None = None
    read_tables: Callable[[StepStream], Iterator[pa.Table]] = read_with_ray

    @property
    def dataset(self) -> range:
        """Object with the length of the data set."""
        return range(self.order.total)

    def __len__(self) -> int:
        return self.order.steps

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        for expected, table in enumerate(self.read_tables(self), start=self.start_step):
            batch = self.tokenizer.unpack(table)
            if batch.step != expected:
                raise RuntimeError(f"expected step {expected} of epoch {self.epoch}, received step {batch.step}")
            yield {"batch": batch}


@dataclass(frozen=True)
class StepReader:
    """State that all reading tasks of a worker share: mostly arrays, which Ray maps into a task without copying.

    Args:
        files: the files.
        blocks_B3: file, start and stop of each block, int64.
        all_good_B: bool, True if each line of the block is a valid row.
        order: order of the epochs.
        tokenizer: makes the tables.
        token_cache: steps in it are not tokenized again.
    """

    files: list[SourceFile]
    blocks_B3: np.ndarray
    all_good_B: np.ndarray
    order: Order
    tokenizer: StepTokenizer
    token_cache: TokenCache | None = None

    @classmethod
    def of(
        cls, survey: Survey, order: Order, tokenizer: StepTokenizer, token_cache: TokenCache | None = None
    ) -> StepReader:
        """Create the reader of surveyed data."""
        blocks_B3 = np.array([(b.file, b.start, b.stop) for b in survey.blocks], np.int64).reshape(-1, 3)
        return cls(survey.files, blocks_B3, survey.rows == survey.lines, order, tokenizer, token_cache)

    def steps(self, epoch: int, window: Window, start_step: int = 0) -> Iterator[pa.Table]:
        """Yield the steps of a window from `start_step` on, each as the tokenizer's table."""
        spans = [span for lane in window.lanes for span in lane.spans]
        rows_of = self._rows(spans)
        lanes = []
        for lane in window.lanes:
            rows = [(rows_of[span.block][number], span.copy) for span in lane.spans for number in span.rows]
            lanes.append([rows[i] for i in lane.permutation()])
        for step in range(max(window.first_step, start_step), window.last_step):
            chosen = [lanes[i][position] for i, position in window.step_rows(step)]
            yield self.tokenizer(epoch, step, [row for row, _ in chosen], [copy for _, copy in chosen])

    def tables(self, epoch: int, rank: int, world: int, start_step: int) -> Iterator[pa.Table]:
        """Yield a worker's steps from `start_step` to the end of its window, from the token cache if they are in it."""

        def steps() -> Iterator[pa.Table]:
            return self.steps(epoch, next(self.order.windows(epoch, rank, world, start_step)), start_step)

        cache = self.token_cache
        return cache.tables(f"{epoch}-{rank}-of-{world}-{start_step}", steps) if cache else steps()

    def _rows(self, spans: list[Span]) -> dict[int, dict[int, Row]]:
        """Return the rows of the spans by block and number; each file is opened, and each block read, once."""
        wanted: dict[int, set[int]] = {}
        for span in spans:
            wanted.setdefault(span.block, set()).update(span.rows)
        parse = self.tokenizer.parse
        rows_of = {}
        for number, blocks in itertools.groupby(sorted(wanted), key=lambda block: int(self.blocks_B3[block, 0])):
            file = self.files[number]
            with open_stream(file) as stream:
                for block in blocks:
                    part = Block(*self.blocks_B3[block].tolist())
                    rows = read_rows(stream, part, parse, wanted[block], bool(self.all_good_B[block]), file.any_text)
                    if len(rows) != len(wanted[block]):
                        raise UserError(f"{file.name} changed during the run")
                    # only the parsed value is needed: other fields can be large
                    rows_of[block] = {at: replace(row, raw={}) for at, row in rows.items()}
        return rows_of


def _read_shared(shared: Any, epoch: int, rank: int, world: int, start_step: int) -> Iterator[pa.Table]:
    import ray

    reader = _opened(shared.hex(), lambda: ray.get(shared))
    yield from reader.tables(epoch, rank, world, start_step)


_OPEN: dict[str, StepReader] = {}


def _opened(name: str, get: Any) -> StepReader:
    """Return a shared reader by name. A process keeps the latest: unpickling a tokenizer can take a second."""
    if name not in _OPEN:
        _OPEN.clear()
        _OPEN[name] = get()
    return _OPEN[name]
