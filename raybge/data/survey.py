"""Survey of all rows before a run starts: valid rows per block, and the invalid rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from raybge.cluster.remote_calls import ray_is_connected, results_in_order
from raybge.data.jsonl import BadRow, Block, Parse, SourceFile, cut, scan
from raybge.util.atomic_write import atomic_stream
from raybge.util.digest import digest
from raybge.util.errors import UserError
from raybge.util.filesystem import filesystem
from raybge.util.plural import plural

IN_PROCESS_BYTES = 64 << 20  # up to this size one process is faster than Ray tasks; also the size of a task's input
MAX_BAD = 1000  # invalid rows that are recorded; others are only counted
LISTED_BAD = 10  # invalid rows that a message lists
_FORMAT = 3  # of the cache file: increment when its content, or the definition of a valid row, changes


@dataclass
class Survey:
    """Valid rows of all blocks.

    Args:
        files: the files.
        blocks: their blocks, in file order.
        rows: valid rows per block, (blocks,) int64.
        lines: physical lines per block, (blocks,) int64.
        bad: the first invalid rows, at most MAX_BAD, with lines counted from the start of the file.
        bad_count: number of all invalid rows.
    """

    files: list[SourceFile]
    blocks: list[Block]
    rows: np.ndarray
    lines: np.ndarray
    bad: list[BadRow]
    bad_count: int

    @property
    def total_rows(self) -> int:
        """Valid rows in all files."""
        return int(self.rows.sum())

    def place(self, block: int, line: int) -> str:
        """Return `file:line` of a line of a block, which is counted from 1 within the block."""
        file = self.blocks[block].file
        first = next(number for number, each in enumerate(self.blocks) if each.file == file)
        return f"{self.files[file].name}:{int(self.lines[first:block].sum()) + line}"

    def rows_by_file(self) -> dict[str, int]:
        """Return the number of valid rows of each file, by its name."""
        counts = dict.fromkeys((file.name for file in self.files), 0)
        for block, count in zip(self.blocks, self.rows, strict=True):
            counts[self.files[block.file].name] += int(count)
        return counts


@dataclass
class _Count:
    """Survey of one block."""

    rows: int
    lines: int
    bad: list[BadRow]
    bad_count: int


def survey(
    files: Sequence[SourceFile],
    block_bytes: int,
    parse: Parse,
    on_bad_rows: str = "stop",
    cache_dir: str | None = None,
) -> Survey:
    """Read and parse every row once; above 64 MiB as Ray tasks if Ray is connected, else in this process.

    Args:
        files: the files.
        block_bytes: bytes of a block, see `cut`.
        parse: raises RowError for an invalid row.
        on_bad_rows: "stop": raise a UserError that names the first invalid rows; "skip": only count and record them.
        cache_dir: local folder for the result, which is reused while paths, sizes, modification times and the arguments
            are the same. A `parse` without a name of its own (lambda, partial) is not cached.

    Returns:
        The survey.

    Raises:
        UserError: rows are invalid and `on_bad_rows` is "stop", or no row is valid.
    """
    files = list(files)
    blocks = cut(files, block_bytes)
    path = _cache_path(cache_dir, files, block_bytes, parse, on_bad_rows)
    cached = _load(path, files, blocks) if path else None
    if cached is not None:
        return cached
    result = _collect(files, blocks, parse, stop=on_bad_rows == "stop")
    if on_bad_rows == "stop" and result.bad_count:
        way_out = "\ncorrect these rows, or leave them out with --on_bad_rows skip" if result.total_rows else ""
        raise UserError(f"{bad_rows_message(result)}{way_out}")
    if not result.total_rows:
        names = ", ".join(file.name for file in files[:LISTED_BAD]) + (", ..." if len(files) > LISTED_BAD else "")
        raise UserError("\n".join(filter(None, [f"there is no usable row in {names}", bad_rows_message(result)])))
    if path:
        _store(path, result)
    return result


def skipped_rows_message(result: Survey, flag: str) -> str:
    """Return the line that reports the skipped rows of a flag's files, and the first of them."""
    return f"{flag}: {plural(result.bad_count, 'invalid row')} skipped\n{bad_rows_message(result)}"


def bad_rows_message(result: Survey) -> str:
    """Return the first invalid rows, one per line, as `file:line: "field" expectation`, then the number of others."""
    lines = []
    for bad in result.bad[:LISTED_BAD]:
        lines.append(f"{result.files[bad.file].name}:{bad.line}: {bad.subject} {bad.expected}")
    more = result.bad_count - len(lines)
    at_least = "at least " if len(result.rows) < len(result.blocks) else ""
    return "\n".join(lines + ([f"and {at_least}{more:,} more"] if more else []))


def _collect(files: list[SourceFile], blocks: list[Block], parse: Parse, stop: bool) -> Survey:
    """Survey all blocks; with `stop`, only until more than MAX_BAD rows are invalid."""
    result = Survey(files, blocks, np.zeros(0, np.int64), np.zeros(0, np.int64), [], 0)
    rows, lines = [], []
    lines_before, file = 0, -1
    counts = _counts(files, blocks, parse)
    for block, count in zip(blocks, counts, strict=False):
        if block.file != file:
            lines_before, file = 0, block.file
        room = MAX_BAD - len(result.bad)
        result.bad += [replace(bad, line=bad.line + lines_before) for bad in count.bad[:room]]
        result.bad_count += count.bad_count
        lines_before += count.lines
        rows.append(count.rows)
        lines.append(count.lines)
        if stop and result.bad_count > MAX_BAD:
            break
    result.rows, result.lines = np.array(rows, np.int64), np.array(lines, np.int64)
    return result


def _counts(files: list[SourceFile], blocks: list[Block], parse: Parse) -> Iterator[_Count]:
    """Yield the count of each block, in order."""
    total = sum(file.size for file in files)
    if total <= IN_PROCESS_BYTES or not ray_is_connected():
        for block in blocks:
            yield _count(files[block.file], block, parse)
        return
    import ray

    count_group = ray.remote(_count_group).remote
    calls = ((count_group, files[group[0].file], group, parse) for group in _groups(files, blocks))
    for counts in results_in_order(calls):
        yield from counts


def _groups(files: list[SourceFile], blocks: list[Block]) -> Iterator[list[Block]]:
    """Yield runs of blocks of one file, of about 64 MiB each."""
    group: list[Block] = []
    size = 0
    for block in blocks:
        if group and (block.file != group[0].file or size >= IN_PROCESS_BYTES):
            yield group
            group, size = [], 0
        group.append(block)
        size += IN_PROCESS_BYTES if files[block.file].kind == "parquet" else block.stop - block.start
    if group:
        yield group


def _count_group(file: SourceFile, blocks: list[Block], parse: Parse) -> list[_Count]:
    return [_count(file, block, parse) for block in blocks]


def _count(file: SourceFile, block: Block, parse: Parse) -> _Count:
    count = _Count(0, 0, [], 0)
    for row, _ in scan(file, block, parse):
        count.lines += 1
        if isinstance(row, BadRow):
            count.bad_count += 1
            if len(count.bad) < MAX_BAD:
                count.bad.append(row)
        elif row is not None:
            count.rows += 1
    return count


# ---- the cache ---------------------------------------------------------------------------------------------


def _cache_path(
    cache_dir: str | None, files: list[SourceFile], block_bytes: int, parse: Parse, on_bad_rows: str
) -> str | None:
    name = getattr(parse, "__qualname__", "<")
    if cache_dir is None or "<" in name:  # <lambda>, <locals>: two different functions can share such a name
        return None
    fingerprints = [file_fingerprint(file) for file in files]
    key = digest(_FORMAT, fingerprints, block_bytes, f"{parse.__module__}.{name}", on_bad_rows)
    return os.path.join(cache_dir, f"survey-{key}.json")


def file_fingerprint(file: SourceFile) -> str:
    """Return a digest that changes with the file's path, size and modification time."""
    return digest(file.path, file.size, file.kind, file.mtime_ns, file.any_text)


def _store(path: str, result: Survey) -> None:
    content = {
        "rows": result.rows.tolist(),
        "lines": result.lines.tolist(),
        "bad": [[bad.file, bad.offset, bad.line, bad.field, bad.expected] for bad in result.bad],
        "bad_count": result.bad_count,
    }
    with atomic_stream(*filesystem(path)) as out:
        out.write(json.dumps(content).encode())


def _load(path: str, files: list[SourceFile], blocks: list[Block]) -> Survey | None:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        rows, lines = (np.array(content[key], np.int64) for key in ("rows", "lines"))
        bad = [BadRow(*each) for each in content["bad"]]
        return Survey(files, blocks, rows, lines, bad, int(content["bad_count"]))
    except (OSError, ValueError, KeyError, TypeError):  # missing or truncated: read the data again
        return None
