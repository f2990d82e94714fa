"""A worker's own Ray Data pipeline: its lanes, in order, as one StepBatch a step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raybge.data.collate import SCHEMA, GroupTokenizer, StepBatch, unpack
from raybge.data.groups import parse_group
from raybge.data.jsonl import Row, read_block
from raybge.data.order import LaneWindow, Order, Window
from raybge.data.survey import Survey
from raybge.errors import UserError

# Steps leave a reading task in blocks of about this size: the first ones arrive before the window is through.
STREAM_BYTES = 1 << 20
PREFETCHED_STEPS = 4


@dataclass
class StepStream:
    """Iterable over the steps of an epoch, for worker `rank` of `world`; `set_epoch` chooses the epoch.

    `len()` is the steps of an epoch and `dataset` has the length of the data set: transformers' Trainer reads its
    number of steps and samples from both.
    """

    survey: Survey
    order: Order
    tokenizer: GroupTokenizer
    rank: int
    world: int
    reading_cpus: float
    epoch: int = 0
    start_step: int = 0

    @property
    def dataset(self) -> range:
        return range(self.order.total)

    def __len__(self) -> int:
        return self.order.steps

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, StepBatch]]:
        tables = self._dataset().iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=PREFETCHED_STEPS)
        for expected, table in enumerate(tables, start=self.start_step):
            batch = unpack(table)
            if batch.step != expected:
                raise RuntimeError(f"step {expected} of epoch {self.epoch} was due, step {batch.step} came")
            yield {"batch": batch}

    def _dataset(self) -> Any:
        import ray
        from ray.data import ExecutionResources
        from ray.data.block import BlockMetadata
        from ray.data.datasource import Datasource, ReadTask

        shared = ray.put((self.survey, self.tokenizer))
        windows = list(self.order.windows(self.epoch, self.rank, self.world, self.start_step))
        epoch, start_step = self.epoch, self.start_step

        class LaneSource(Datasource):
            """One read task a window."""

            def estimate_inmemory_data_size(self) -> int | None:
                return None

            def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
                about = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
                return [
                    ReadTask(functools.partial(_read_shared, shared, w, epoch, start_step), about, SCHEMA)
                    for w in windows
                ]

        dataset = ray.data.read_datasource(
            LaneSource(),
            override_num_blocks=len(windows),
            ray_remote_args={"num_cpus": min(1.0, self.reading_cpus)},
        )
        dataset.context.target_max_block_size = STREAM_BYTES
        dataset.context.execution_options.preserve_order = True
        dataset.context.execution_options.resource_limits = ExecutionResources(cpu=self.reading_cpus)
        dataset.context.enable_progress_bars = False
        return dataset


def _read_shared(shared: Any, window: Window, epoch: int, start_step: int) -> Iterator[pa.Table]:
    import ray

    survey, tokenizer = ray.get(shared)
    yield from read_window(survey, tokenizer, window, epoch, start_step)


def read_window(
    survey: Survey, tokenizer: GroupTokenizer, window: Window, epoch: int, start_step: int = 0
) -> Iterator[pa.Table]:
    """A window's steps from `start_step` on, each as the table that `tokenizer` makes of its rows."""
    lanes = [_read_lane(survey, lane) for lane in window.lanes]
    orders = [lane.permutation() for lane in window.lanes]
    for step in range(max(window.first_step, start_step), window.last_step):
        rows = [lanes[i][orders[i][position]] for i, position in window.step_rows(step)]
        yield tokenizer(epoch, step, rows)


def _read_lane(survey: Survey, lane: LaneWindow) -> list[Row]:
    rows: list[Row] = []
    for span in lane.spans:
        block = survey.blocks[span.block]
        good = (row for row in read_block(survey.files, block, parse_group) if isinstance(row, Row))
        found = [row for _, row in zip(range(span.stop), good, strict=False)][span.start :]
        if len(found) != span.stop - span.start:
            raise UserError(f"{survey.files[block.file].name} changed while it was in use")
        rows += found
    return rows
