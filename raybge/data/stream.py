"""A worker's own Ray Data pipeline: its lanes, in order, as one batch a step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from raybge.data.jsonl import Block, Parse, Row, read_rows
from raybge.data.mixture import Span
from raybge.data.order import Order, Window
from raybge.data.source_files import SourceFile, open_stream
from raybge.data.survey import Survey
from raybge.data.token_cache import TokenCache
from raybge.util.errors import UserError

# Steps leave a reading task in blocks of about this size. Small, so that a step waits for few others: a step of a large
# batch is a block by itself.
STREAM_BYTES = 64 << 10
PREFETCHED_STEPS = 4


class Batch(Protocol):
    """A worker's share of a step: `rows` are (file, offset) of each, `token_ids` the ids of each text."""

    @property
    def step(self) -> int: ...

    @property
    def rows(self) -> list[tuple[int, int]]: ...

    @property
    def token_ids(self) -> list[np.ndarray]: ...


class StepTokenizer(Protocol):
    """The way from a step's rows to its batch: called where rows are read, it gives a table of one row of `schema`, of
    which `unpack` makes the batch in the worker.
    """

    @property
    def schema(self) -> pa.Schema: ...

    @property
    def parse(self) -> Parse:
        """What makes a row's value of its fields."""

    def __call__(self, epoch: int, step: int, rows: Sequence[Row], copies: Sequence[int] | None = None) -> pa.Table:
        """`copies`: which of its appearances in the epoch each row's is, counted from 0."""

    def unpack(self, table: pa.Table) -> Batch: ...


@dataclass
class StepStream:
    """Iterable over the steps of an epoch, for worker `rank` of `world`; `set_epoch` chooses the epoch.

    `len()` is the steps of an epoch and `dataset` has the length of the data set: transformers' Trainer reads its
    number of steps and samples from both. What is `kept` is not made again.
    """

    survey: Survey
    order: Order
    tokenizer: StepTokenizer
    rank: int
    world: int
    reading_cpus: float
    epoch: int = 0
    start_step: int = 0
    kept: TokenCache | None = None

    @property
    def dataset(self) -> range:
        return range(self.order.total)

    def __len__(self) -> int:
        return self.order.steps

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        tables = self._dataset().iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=PREFETCHED_STEPS)
        for expected, table in enumerate(tables, start=self.start_step):
            batch = self.tokenizer.unpack(table)
            if batch.step != expected:
                raise RuntimeError(f"step {expected} of epoch {self.epoch} was due, step {batch.step} came")
            yield {"batch": batch}

    def _dataset(self) -> Any:
        import ray
        from ray.data import ExecutionResources
        from ray.data.block import BlockMetadata
        from ray.data.datasource import Datasource, ReadTask

        shared = ray.put(StepReader.of(self.survey, self.order, self.tokenizer, self.kept))
        about = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        # A task is a few numbers: it works out by itself what its window reads.
        tasks = [
            ReadTask(
                functools.partial(_read_shared, shared, self.epoch, self.rank, self.world, max(first, self.start_step)),
                about,
                self.tokenizer.schema,
            )
            for first, _ in self.order.window_bounds(self.start_step)
        ]

        class LaneSource(Datasource):
            """One read task a window."""

            def estimate_inmemory_data_size(self) -> int | None:
                return None

            def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
                return tasks

        dataset = ray.data.read_datasource(
            LaneSource(),
            override_num_blocks=len(tasks),
            ray_remote_args={"num_cpus": min(1.0, self.reading_cpus)},
        )
        dataset.context.target_max_block_size = STREAM_BYTES
        dataset.context.execution_options.preserve_order = True
        dataset.context.execution_options.resource_limits = ExecutionResources(cpu=self.reading_cpus)
        dataset.context.enable_progress_bars = False
        return dataset


@dataclass(frozen=True)
class StepReader:
    """What all reading tasks of a worker share: mostly arrays, which Ray maps into a task without copying.

    `blocks_B3`: file, start and stop of each block. `all_good_B`: each of its lines is a good row.
    """

    files: list[SourceFile]
    blocks_B3: np.ndarray
    all_good_B: np.ndarray
    order: Order
    tokenizer: StepTokenizer
    kept: TokenCache | None = None

    @classmethod
    def of(cls, survey: Survey, order: Order, tokenizer: StepTokenizer, kept: TokenCache | None = None) -> StepReader:
        blocks_B3 = np.array([(b.file, b.start, b.stop) for b in survey.blocks], np.int64).reshape(-1, 3)
        return cls(survey.files, blocks_B3, survey.rows == survey.lines, order, tokenizer, kept)

    def steps(self, epoch: int, window: Window, start_step: int = 0) -> Iterator[pa.Table]:
        """A window's steps from `start_step` on, each as the table that the tokenizer makes of its rows."""
        spans = [span for lane in window.lanes for span in lane.spans]
        found = self._rows(spans)
        lanes = []
        for lane in window.lanes:
            rows = [(found[span.block][number], span.copy) for span in lane.spans for number in span.rows]
            lanes.append([rows[i] for i in lane.permutation()])
        for step in range(max(window.first_step, start_step), window.last_step):
            chosen = [lanes[i][position] for i, position in window.step_rows(step)]
            yield self.tokenizer(epoch, step, [row for row, _ in chosen], [copy for _, copy in chosen])

    def _rows(self, spans: list[Span]) -> dict[int, dict[int, Row]]:
        """The rows of the spans by block and number; each file is opened, and each block read, once."""
        wanted: dict[int, set[int]] = {}
        for span in spans:
            wanted.setdefault(span.block, set()).update(span.rows)
        parse = self.tokenizer.parse
        found = {}
        for number, blocks in itertools.groupby(sorted(wanted), key=lambda block: int(self.blocks_B3[block, 0])):
            file = self.files[number]
            with open_stream(file) as stream:
                for block in blocks:
                    where = Block(*self.blocks_B3[block].tolist())
                    rows = read_rows(stream, where, parse, wanted[block], bool(self.all_good_B[block]))
                    if len(rows) != len(wanted[block]):
                        raise UserError(f"{file.name} changed while it was in use")
                    # of a row only what was parsed is kept: other fields can be large
                    found[block] = {at: replace(row, raw={}) for at, row in rows.items()}
        return found


def _read_shared(shared: Any, epoch: int, rank: int, world: int, start_step: int) -> Iterator[pa.Table]:
    import ray

    reading = _opened(shared.hex(), lambda: ray.get(shared))

    def steps() -> Iterator[pa.Table]:
        return reading.steps(epoch, next(reading.order.windows(epoch, rank, world, start_step)), start_step)

    yield from reading.kept.tables(f"{epoch}-{rank}-of-{world}-{start_step}", steps) if reading.kept else steps()


_OPEN: dict[str, StepReader] = {}


def _opened(name: str, get: Any) -> StepReader:
    """What was shared under a name. A process keeps the last: making a tokenizer of its bytes can take a second."""
    if name not in _OPEN:
        _OPEN.clear()
        _OPEN[name] = get()
    return _OPEN[name]
