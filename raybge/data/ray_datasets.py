"""Ray datasets of one Ray block per read task, in order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raybge.data.jsonl import Block, Parse, Row, scan
from raybge.data.source_files import SourceFile
from raybge.data.survey import Survey
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset

SCHEMA = pa.schema([("block", pa.int64()), ("file", pa.int32()), ("offset", pa.int64()), ("json", pa.string())])


@dataclass(frozen=True)
class BlockRead:
    """One read task of a dataset.

    Args:
        read: called on a Ray worker; returns the tables.
        size_bytes: bytes that it reads, if known.
        rows: rows that it returns, if known.
        file: name of the file that it reads, if it is one.
    """

    read: Callable[[], Iterable[pa.Table]]
    size_bytes: int | None = None
    rows: int | None = None
    file: str | None = None


def dataset_of_reads(
    reads: Sequence[BlockRead],
    schema: pa.Schema,
    target_block_bytes: int | None = None,
    ray_remote_args: dict[str, Any] | None = None,
) -> Dataset:
    """Create a dataset of read tasks whose blocks stay in order, here and in the map_batches after it.

    Args:
        reads: the read tasks.
        schema: schema of their tables.
        target_block_bytes: size at which Ray splits a task's output into blocks; None: one block per task, so that
            `map_batches(batch_size=None)` receives exactly the output of one task.
        ray_remote_args: options of the read tasks, such as `num_cpus`.

    Returns:
        The dataset; its own context has these settings.
    """
    import ray
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    sizes = [each.size_bytes for each in reads]

    class ReadsDatasource(Datasource):
        """Defined in the function, because its base class requires Ray to be imported."""

        def estimate_inmemory_data_size(self) -> int | None:
            return None if None in sizes else sum(size or 0 for size in sizes)

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
        ) -> list[ReadTask]:
            tasks = []
            for each in reads:
                files = (each.file,) if each.file else None
                metadata = BlockMetadata(
                    num_rows=each.rows, size_bytes=each.size_bytes, input_files=files, exec_stats=None
                )
                tasks.append(ReadTask(each.read, metadata, schema, per_task_row_limit))
            return tasks

    dataset = ray.data.read_datasource(
        ReadsDatasource(), override_num_blocks=len(reads), ray_remote_args=ray_remote_args
    )
    dataset.context.target_max_block_size = target_block_bytes  # Ray's default splits a block above 128 MiB
    dataset.context.execution_options.preserve_order = True
    return dataset


def to_dataset(survey: Survey, parse: Parse) -> Dataset:
    """Create a dataset of the valid rows with the columns of `SCHEMA`, one Ray block per Block, in order.

    `block` is the index in survey.blocks, `json` the row's text as it is in the file. Reading raises a UserError if the
    file has another number of valid rows than the survey.
    """
    reads = []
    for index, block in enumerate(survey.blocks):
        file, rows = survey.files[block.file], int(survey.rows[index])
        read = functools.partial(_read, file, block, index, rows, parse)
        reads.append(BlockRead(read, block_size(file, block), rows, file.name))
    return dataset_of_reads(reads, SCHEMA)


def block_size(file: SourceFile, block: Block) -> int:
    """Return the bytes that reading a block takes, at most."""
    return file.size if file.kind == "parquet" else block.stop - block.start


def _read(file: SourceFile, block: Block, index: int, rows: int, parse: Parse) -> Iterable[pa.Table]:
    offsets, texts = [], []
    for row, text in scan(file, block, parse):
        if isinstance(row, Row):
            offsets.append(row.offset)
            texts.append(text)
    if len(texts) != rows:
        raise UserError(f"{file.name} changed during the run: a block had {rows} rows and has {len(texts)} now")
    columns = [
        pa.array([index] * rows, pa.int64()),
        pa.array([block.file] * rows, pa.int32()),
        pa.array(offsets, pa.int64()),
        pa.array(texts, pa.string()),
    ]
    return [pa.Table.from_arrays(columns, schema=SCHEMA)]


@contextmanager
def batches_of(dataset: Dataset) -> Iterator[Iterator[pa.Table]]:
    """Iterate over the blocks of a dataset; Ray Data has stopped when the `with` block ends.

    After an interrupt in the loop, Ray Data would otherwise run as long as the traceback refers to the iterator. Ray
    crashes the process if it is shut down meanwhile.
    """
    batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    try:
        yield batches
    finally:
        batches.close()
