"""One pass over all rows before anything else happens: how many rows each block holds, and which rows cannot
be used.
"""

import hashlib
import json
import os
import sys
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raybge.data.jsonl import BadRow, Block, Parse, SourceFile, cut, scan
from raybge.util.errors import UserError

IN_PROCESS_BYTES = 64 << 20  # up to here one process is quicker than Ray's tasks; also what one task reads
KEPT = 1000  # bad rows that are kept; the others are counted
NAMED = 10  # bad rows that a message names
_FORMAT = 1  # of the cache file: count up whenever its content, or what counts as a good row, changes


@dataclass
class Survey:
    """`rows`: good rows per block, `lines`: physical lines per block (both np.int64, (blocks,)). `bad` holds
    the first bad rows, at most `KEPT`, with lines counted from the file's start; `bad_count` counts them all.
    """

    files: list[SourceFile]
    blocks: list[Block]
    rows: np.ndarray
    lines: np.ndarray
    bad: list[BadRow]
    bad_count: int

    @property
    def total_rows(self) -> int:
        """Good rows in all files."""
        return int(self.rows.sum())

    def rows_by_file(self) -> dict[str, int]:
        """Good rows of each file, by its name."""
        found = dict.fromkeys((file.name for file in self.files), 0)
        for block, count in zip(self.blocks, self.rows, strict=True):
            found[self.files[block.file].name] += int(count)
        return found


@dataclass
class _Count:
    """What was found in one block."""

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
    """Read and parse every row once. Above 64 MiB this runs as Ray tasks if Ray is connected, else in this
    process.

    "stop": UserError that names the first bad rows with file, line and field. "skip": they are counted and
    kept. UserError also where no good row is left. With `cache_dir` (a local folder) the result is kept there
    and used again as long as paths, sizes, times, `block_bytes` and the arguments are the same; a `parse`
    without a name of its own (lambda, partial) is not cached.
    """
    files = list(files)
    blocks = cut(files, block_bytes)
    path = _cache_path(cache_dir, files, block_bytes, parse, on_bad_rows)
    known = _load(path, files, blocks) if path else None
    if known is not None:
        return known
    found = _collect(files, blocks, parse, stop=on_bad_rows == "stop")
    if on_bad_rows == "stop" and found.bad_count:
        raise UserError(bad_rows_message(found))
    if not found.total_rows:
        where = ", ".join(file.name for file in files[:NAMED]) + (", ..." if len(files) > NAMED else "")
        raise UserError("\n".join(filter(None, [f"there is no usable row in {where}", bad_rows_message(found)])))
    if path:
        _store(path, found)
    return found


def bad_rows_message(found: Survey) -> str:
    """The first bad rows, one a line, as `file:line: "field" what was expected`, then how many more there
    are.
    """
    says = []
    for bad in found.bad[:NAMED]:
        subject = f'"{bad.field}"' if bad.field else "the row"
        says.append(f"{found.files[bad.file].name}:{bad.line}: {subject} {bad.expected}")
    more = found.bad_count - len(says)
    at_least = "at least " if len(found.rows) < len(found.blocks) else ""
    return "\n".join(says + ([f"and {at_least}{more:,} more"] if more else []))


def _collect(files: list[SourceFile], blocks: list[Block], parse: Parse, stop: bool) -> Survey:
    """The counts of all blocks; with `stop`, only until there are more bad rows than are kept."""
    found = Survey(files, blocks, np.zeros(0, np.int64), np.zeros(0, np.int64), [], 0)
    rows, lines = [], []
    lines_before, file = 0, -1
    counts = _counts(files, blocks, parse)
    for block, count in zip(blocks, counts, strict=False):
        if block.file != file:
            lines_before, file = 0, block.file
        room = KEPT - len(found.bad)
        found.bad += [replace(bad, line=bad.line + lines_before) for bad in count.bad[:room]]
        found.bad_count += count.bad_count
        lines_before += count.lines
        rows.append(count.rows)
        lines.append(count.lines)
        if stop and found.bad_count > KEPT:
            break
    found.rows, found.lines = np.array(rows, np.int64), np.array(lines, np.int64)
    return found


def _counts(files: list[SourceFile], blocks: list[Block], parse: Parse) -> Iterator[_Count]:
    """One count a block, in order."""
    total = sum(file.size for file in files)
    if total <= IN_PROCESS_BYTES or not ray_is_connected():
        for block in blocks:
            yield _count(files[block.file], block, parse)
        return
    import ray

    task = ray.remote(_count_group)
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    pending: deque[Any] = deque()
    try:
        for group in _groups(files, blocks):
            if len(pending) >= 2 * cores:  # enough to keep every core busy, little to throw away
                yield from result_of(pending.popleft())
            pending.append(task.remote(files[group[0].file], group, parse))
        while pending:
            yield from result_of(pending.popleft())
    finally:
        for ref in pending:
            ray.cancel(ref)


def result_of(ref: Any) -> Any:
    """ray.get, where a UserError comes out as it was raised: Ray's own wrapper would put the traceback into
    its message.
    """
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as err:
        raise (err.cause if isinstance(err.cause, UserError) else err) from None


def ray_is_connected() -> bool:
    """Whether this process has a Ray cluster to send tasks to; does not import Ray."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _groups(files: list[SourceFile], blocks: list[Block]) -> Iterator[list[Block]]:
    """Runs of blocks of one file, of about 64 MiB."""
    group: list[Block] = []
    held = 0
    for block in blocks:
        if group and (block.file != group[0].file or held >= IN_PROCESS_BYTES):
            yield group
            group, held = [], 0
        group.append(block)
        held += IN_PROCESS_BYTES if files[block.file].kind == "parquet" else block.stop - block.start
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
            if len(count.bad) < KEPT:
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
    what = [
        _FORMAT,
        [file_fingerprint(file) for file in files],
        block_bytes,
        f"{parse.__module__}.{name}",
        on_bad_rows,
    ]
    return os.path.join(cache_dir, f"survey-{_digest(what)}.json")


def file_fingerprint(file: SourceFile) -> str:
    """Changes when the file behind the path does: its size or its time."""
    return _digest([file.path, file.size, file.kind, file.mtime_ns])


def _digest(what: object) -> str:
    return hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()


def _store(path: str, found: Survey) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    aside = f"{path}.{uuid.uuid4().hex}.tmp"
    kept = {
        "rows": found.rows.tolist(),
        "lines": found.lines.tolist(),
        "bad": [[bad.file, bad.offset, bad.line, bad.field, bad.expected] for bad in found.bad],
        "bad_count": found.bad_count,
    }
    with open(aside, "w", encoding="utf-8") as out:
        json.dump(kept, out)
    os.replace(aside, path)


def _load(path: str, files: list[SourceFile], blocks: list[Block]) -> Survey | None:
    try:
        with open(path, encoding="utf-8") as kept_file:
            kept = json.load(kept_file)
        rows, lines = (np.array(kept[key], np.int64) for key in ("rows", "lines"))
        bad = [BadRow(*each) for each in kept["bad"]]
        return Survey(files, blocks, rows, lines, bad, int(kept["bad_count"]))
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not whole: read the data again
        return None
