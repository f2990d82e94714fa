"""Rows as a Ray dataset, and packed files made plain so that Ray can read one file with many readers."""

import functools
import os
import posixpath
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from raybge.data.groups import RowError
from raybge.data.jsonl import BadRow, Block, Parse, Row, array_elements, scan
from raybge.data.source_files import BUFFER, SourceFile, open_stream
from raybge.data.survey import IN_PROCESS_BYTES, Survey, file_fingerprint, ray_is_connected, result_of
from raybge.util.errors import UserError
from raybge.util.filesystem import append_to_path, filesystem

if TYPE_CHECKING:
    from ray.data import Dataset

SCHEMA = pa.schema([("block", pa.int64()), ("file", pa.int32()), ("offset", pa.int64()), ("json", pa.string())])


def to_dataset(survey: Survey, parse: Parse) -> "Dataset":
    """The good rows as a ray.data.Dataset with the columns of `SCHEMA`: one read task and one Ray block per
    Block, in order.

    `block` is the index in survey.blocks, `json` the row's text as it is in the file. Reading a file that has
    another number of good rows than the survey found raises UserError. The dataset's own context keeps blocks
    whole and in order, here and in the map_batches after it: `batch_size=None` then sees exactly one Block.
    """
    import ray
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class JsonRowsDatasource(Datasource):
        """Here, because its base is known only once Ray is imported."""

        def estimate_inmemory_data_size(self) -> int:
            return sum(file.size for file in survey.files)

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
        ) -> list[ReadTask]:
            tasks = []
            for index, block in enumerate(survey.blocks):
                file, rows = survey.files[block.file], int(survey.rows[index])
                read = functools.partial(_read, file, block, index, rows, parse)
                size = file.size if file.kind == "parquet" else block.stop - block.start
                metadata = BlockMetadata(num_rows=rows, size_bytes=size, input_files=(file.name,), exec_stats=None)
                tasks.append(ReadTask(read, metadata, SCHEMA, per_task_row_limit))
            return tasks

    dataset = ray.data.read_datasource(JsonRowsDatasource(), override_num_blocks=len(survey.blocks))
    dataset.context.target_max_block_size = None  # else Ray cuts a Block above 128 MiB in two
    dataset.context.execution_options.preserve_order = True
    return dataset


def _read(file: SourceFile, block: Block, index: int, rows: int, parse: Parse) -> Iterable[pa.Table]:
    offsets, texts = [], []
    for row, text in scan(file, block, parse):
        if isinstance(row, Row):
            offsets.append(row.offset)
            texts.append(text)
    if len(texts) != rows:
        raise UserError(f"{file.name} changed while it was in use: a part that held {rows} rows holds {len(texts)}")
    columns = [
        pa.array([index] * rows, pa.int64()),
        pa.array([block.file] * rows, pa.int32()),
        pa.array(offsets, pa.int64()),
        pa.array(texts, pa.string()),
    ]
    return [pa.Table.from_arrays(columns, schema=SCHEMA)]


def transcode(
    files: Sequence[SourceFile], folder: str, kinds: Sequence[str] = ("gzip", "zstd", "array")
) -> list[SourceFile]:
    """The files with each one of `kinds` replaced by a plain .jsonl under `folder`; the others as
    they are.

    A file is written once, under a name made from its file_fingerprint, and used again. `name` stays the person's
    own; lines keep their numbers (in arrays: the element's number). On a cluster `folder` must be one that
    every node sees. Above 64 MiB the files are written by Ray tasks if Ray is connected. UserError where a
    file is damaged or holds nothing.
    """
    folder = folder if "://" in folder else os.path.abspath(folder)
    packed = [file for file in files if file.kind in kinds]
    if ray_is_connected() and sum(file.size for file in packed) > IN_PROCESS_BYTES:
        import ray

        task = ray.remote(_transcode)
        refs = [task.remote(file, folder) for file in packed]
        plain = {file: result_of(ref) for file, ref in zip(packed, refs, strict=True)}
    else:
        plain = {file: _transcode(file, folder) for file in packed}
    return [plain.get(file, file) for file in files]


def _transcode(file: SourceFile, folder: str) -> SourceFile:
    stem = posixpath.basename(file.name).split(".")[0]
    target = append_to_path(folder, f"/{stem}-{file_fingerprint(file)}.jsonl")
    store, path = filesystem(target)
    info = store.get_file_info(path)
    if not info.is_file:
        store.create_dir(posixpath.dirname(path), recursive=True)
        aside = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with open_stream(file) as packed, store.open_output_stream(aside) as out:
                UNPACK[file.kind](file, packed, out)
            store.move(aside, path)
        except BaseException:
            if store.get_file_info(aside).is_file:
                store.delete_file(aside)
            raise
        info = store.get_file_info(path)
    if not info.size:
        raise UserError(f"{file.name} holds no rows")
    return replace(file, path=target, size=info.size, kind="jsonl", mtime_ns=info.mtime_ns or 0)


def _unpack(file: SourceFile, packed: pa.NativeFile, out: pa.NativeFile) -> None:
    while True:
        try:
            data = packed.read(BUFFER)
        except OSError as err:
            raise UserError(f"{file.name} is not a whole {file.kind} file ({err})") from err
        if not data:
            return
        out.write(data)


def _unpack_array(file: SourceFile, packed: pa.NativeFile, out: pa.NativeFile) -> None:
    for number, text in array_elements(packed):
        if isinstance(text, RowError):
            raise UserError(f"{file.name}:{number + 1}: the row {text.expected}")
        # bytes that are not UTF-8 stay as they are, to be named when the row is read
        out.write(text.encode(errors="surrogateescape") + b"\n")


def _unpack_parquet(file: SourceFile, packed: pa.NativeFile, out: pa.NativeFile) -> None:
    try:
        groups = pq.read_metadata(packed).num_row_groups
    except (OSError, pa.ArrowException) as err:
        raise UserError(f"{file.name} is not a whole Parquet file ({err})") from err
    for row, text in scan(file, Block(0, 0, groups), dict):
        if isinstance(row, BadRow):
            raise UserError(f"{file.name}:{row.line}: the row {row.expected}")
        out.write(text.encode() + b"\n")


UNPACK = {"gzip": _unpack, "zstd": _unpack, "array": _unpack_array, "parquet": _unpack_parquet}
