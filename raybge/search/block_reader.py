"""Reading of passages and queries, one block of a file per Ray read task.

Letters in array names: P passages (duplicates counted), N texts, K keys of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raybge.data.groups import Group
from raybge.data.jsonl import Block, Parse, Row, scan
from raybge.data.source_files import SourceFile
from raybge.search.deduplication import Key, TextsOfRow
from raybge.search.key_table import key_words
from raybge.search.search_data import SearchData
from raybge.util.errors import UserError

# One encoded block of passages or queries. `text`: the passage, or the query's row as JSON. `id`: the passage's id in
# its corpus, null if it has none. `known`: keys as pairs of 64-bit words: the passage's own, or those of
# `Queries.known`. The column `vector` (D float32) is appended; `pos_scores` too if positives are encoded: their inner
# products with the query.
ENCODED = pa.schema(
    [
        ("file", pa.int32()),
        ("offset", pa.int64()),
        ("text", pa.large_string()),
        ("id", pa.large_string()),
        ("known", pa.large_list(pa.uint64())),
    ]
)
# One block as an actor receives it. Of queries also their text, their own prompt and the positives to encode; null for
# passages. `block`: number of the block among all.
READ = pa.schema(
    [
        *ENCODED,
        ("query", pa.large_string()),
        ("prompt", pa.large_string()),
        ("positives", pa.large_list(pa.large_string())),
        ("block", pa.int64()),
    ]
)

Read = Callable[[], list[pa.Table]]


@dataclass(frozen=True)
class PassageReader:
    """Read task of one block of passages.

    Args:
        number: number of the block among all.
        file: file of the block.
        block: byte range.
        parse: parser of a row.
        texts: returns the passages of a parsed row.
        key: hash of a passage.
        first: reads first_P: true for the first passage of its text.
    """

    number: int
    file: SourceFile
    block: Block
    parse: Parse
    texts: TextsOfRow
    key: Key
    first: Callable[[], np.ndarray]

    def __call__(self) -> list[pa.Table]:
        """Return the distinct passages of the block, as one table of `READ`."""
        first_P = self.first()
        rows = [
            (row.offset, text)
            for row, _ in scan(self.file, self.block, self.parse)
            if isinstance(row, Row)
            for text in self.texts(row.value)
        ]
        _check_unchanged(self.file, len(rows), len(first_P))
        rows = [row for row, first in zip(rows, first_P, strict=True) if first]
        keys_N2 = key_words([self.key(text) for _, text in rows])
        return [read_table(self.number, self.block.file, rows, [keys_N2[n : n + 1] for n in range(len(rows))])]


@dataclass(frozen=True)
class QueryReader:
    """Read task of one block of queries.

    Args:
        number: number of the block among all.
        file: file of the block.
        block: byte range.
        rows: rows that the survey counted.
        parse: parser of a row, to a Group.
        known: returns the texts of a group that a search reports.
        key: hash of a text.
        shared_positives: reads more keys, (K, 2) for each row.
        encode_positives: pass the positives on.
    """

    number: int
    file: SourceFile
    block: Block
    rows: int
    parse: Parse
    known: Callable[[Group], Sequence[str]]
    key: Key
    shared_positives: Callable[[], list[np.ndarray]] | None = None
    encode_positives: bool = False

    def __call__(self) -> list[pa.Table]:
        """Return the queries of the block, as one table of `READ`."""
        rows = [(row, text) for row, text in scan(self.file, self.block, self.parse) if isinstance(row, Row)]
        _check_unchanged(self.file, len(rows), self.rows)
        groups: list[Group] = [row.value for row, _ in rows]
        keys = [key_words([self.key(text) for text in self.known(group)]) for group in groups]
        if self.shared_positives:
            keys = [np.concatenate(each) for each in zip(keys, self.shared_positives(), strict=True)]
        positives = [group.pos for group in groups] if self.encode_positives else None
        places = [(row.offset, text) for row, text in rows]
        return [read_table(self.number, self.block.file, places, keys, groups, positives)]


def block_readers(data: SearchData) -> list[tuple[Read, int]]:
    """Return (read task, bytes that it reads) of each block, passages first.

    A task holds its own block only: the whole survey is too large to be sent with each.
    """
    passages, queries = data.passages, data.queries
    readers: list[tuple[Read, int]] = []
    for index, block in enumerate(passages.survey.blocks):
        file = passages.survey.files[block.file]
        first = data.unique.reader(index)
        reader = PassageReader(index, file, block, passages.parse, passages.texts, passages.key, first)
        readers.append((reader, _size(file, block)))
    for index, block in enumerate(queries.survey.blocks):
        file = queries.survey.files[block.file]
        shared = queries.shared_positives.reader(index) if queries.shared_positives else None
        query_reader = QueryReader(
            len(passages.survey.blocks) + index,
            file,
            block,
            int(queries.survey.rows[index]),
            queries.parse,
            queries.known,
            queries.key,
            shared,
            queries.encode_positives,
        )
        readers.append((query_reader, _size(file, block)))
    return readers


def _size(file: SourceFile, block: Block) -> int:
    return file.size if file.kind == "parquet" else block.stop - block.start


def _check_unchanged(file: SourceFile, count: int, expected: int) -> None:
    if count != expected:
        raise UserError(
            f"{file.name} changed during the run: a block that held {expected:,} texts now holds {count:,}; start again"
        )


def read_table(
    number: int,
    file: int,
    rows: Sequence[tuple[int, str]],
    keys: Sequence[np.ndarray],
    groups: Sequence[Group] | None = None,
    positives: Sequence[Sequence[str]] | None = None,
) -> pa.Table:
    """Build a table of `READ`.

    Args:
        number: number of the block among all.
        file: index of the file.
        rows: (offset, text) of each row.
        keys: known keys of each row, (K, 2) uint64.
        groups: the groups of queries; None for passages.
        positives: positives to encode, for each row.

    Returns:
        The table.
    """
    words = np.concatenate([np.zeros(0, np.uint64), *(each.ravel() for each in keys)])
    ends = np.cumsum([0] + [each.size for each in keys])
    nulls = [None] * len(rows)
    columns = [
        pa.array([file] * len(rows), pa.int32()),
        pa.array([offset for offset, _ in rows], pa.int64()),
        pa.array([text for _, text in rows], pa.large_string()),
        pa.array([getattr(text, "id", None) for _, text in rows], pa.large_string()),
        pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(words, pa.uint64())),
        pa.array([group.query for group in groups] if groups else nulls, pa.large_string()),
        pa.array([group.prompt for group in groups] if groups else nulls, pa.large_string()),
        pa.array(positives or nulls, pa.large_list(pa.large_string())),
        pa.array([number] * len(rows), pa.int64()),
    ]
    return pa.Table.from_arrays(columns, schema=READ)
