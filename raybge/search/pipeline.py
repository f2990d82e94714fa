"""From files to vectors on Ray: find the passages' duplicates, encode what is left on Ray Data actors.

What is encoded together is cut by the data alone, never by the number of actors, so that the vectors are the
same for any number of them. Texts and vectors never pass through the driver: it holds references, and 24
bytes for each passage (and as many to sort them) while it looks for duplicates, 1 byte afterwards.

Letters in array names: P passages (duplicates counted), B blocks, N texts, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.cluster import Plan
from raybge.data.files import SourceFile
from raybge.data.groups import Group, text_key
from raybge.data.jsonl import Block, Parse, Row, scan
from raybge.data.survey import Survey
from raybge.errors import UserError
from raybge.screen import Screen
from raybge.search.calls import in_order, unwrapped
from raybge.search.shards import words_of

KEY_BLOCKS = 32  # blocks that one task hashes

# One encoded block, passages or queries. `text`: the passage, or the query's row as JSON. `known`: keys as
# pairs of words: the passage's own, or those of `Queries.known`. `vector` follows, D float32.
ENCODED = pa.schema(
    [
        ("file", pa.int32()),
        ("offset", pa.int64()),
        ("text", pa.large_string()),
        ("known", pa.large_list(pa.uint64())),
    ]
)
# What an actor is given: of a query also its text and its own prompt, which are null for passages.
READ = pa.schema([*ENCODED, ("query", pa.large_string()), ("prompt", pa.large_string())])


@dataclass(frozen=True)
class Passages:
    """The pool before duplicates are dropped: `texts` gives the passages of one parsed row."""

    survey: Survey
    parse: Parse
    texts: Callable[[Any], Sequence[str]]


@dataclass(frozen=True)
class Queries:
    """Rows that parse to a Group; `known` names the texts whose passage ids a search must also give."""

    survey: Survey
    parse: Parse
    known: Callable[[Group], Sequence[str]]


@dataclass(frozen=True)
class Kept:
    """Which passages of the pool come first of their text: `keep_P` in the order of block, row and place in
    the row; `start_B` is where each block begins in it, and the end of the last.
    """

    keep_P: np.ndarray
    start_B: np.ndarray

    @property
    def passages(self) -> int:
        return int(self.keep_P.sum())

    @property
    def dropped(self) -> int:
        return len(self.keep_P) - self.passages


@dataclass(frozen=True)
class Piece:
    """One encoded block that lies in Ray's object store."""

    ref: Any
    rows: int


def passage_itself(text: str) -> Sequence[str]:
    return (text,)


def passages_of_group(group: Group) -> Sequence[str]:
    return group.pos + group.neg


# --- duplicates -------------------------------------------------------------------------------------------


def deduplicate(passages: Passages) -> Kept:
    """Find the first passage of each text, by its 16-byte content hash. Ray must be connected."""
    found = passages.survey
    blocks = [(found.files[block.file], block) for block in found.blocks]
    groups = [blocks[at : at + KEY_BLOCKS] for at in range(0, len(blocks), KEY_BLOCKS)]
    import ray

    task = ray.remote(_keys)
    results = list(in_order((task.remote, group, passages.parse, passages.texts) for group in groups))
    counts_B = np.concatenate([counts for counts, _ in results])
    keys_P2 = np.concatenate([keys for _, keys in results])
    start_B = np.concatenate([[0], np.cumsum(counts_B)])
    return Kept(first_of_each(keys_P2), start_B)


def first_of_each(keys_P2: np.ndarray) -> np.ndarray:
    """keep_P: true for the first row of each distinct key."""
    order_P = np.lexsort((keys_P2[:, 1], keys_P2[:, 0]))  # stable: among equals the first comes first
    differs_P = np.ones(len(keys_P2), bool)
    differs_P[1:] = (keys_P2[order_P[1:]] != keys_P2[order_P[:-1]]).any(axis=1)
    keep_P = np.zeros(len(keys_P2), bool)
    keep_P[order_P[differs_P]] = True
    return keep_P


def _keys(
    blocks: list[tuple[SourceFile, Block]], parse: Parse, texts: Callable[[Any], Sequence[str]]
) -> tuple[np.ndarray, np.ndarray]:
    counts: list[int] = []
    keys: list[bytes] = []
    for file, block in blocks:
        before = len(keys)
        for row, _ in scan(file, block, parse):
            if isinstance(row, Row):
                keys += [text_key(text) for text in texts(row.value)]
        counts.append(len(keys) - before)
    return np.array(counts, np.int64), words_of(keys)


# --- encoding ---------------------------------------------------------------------------------------------


def encode(
    passages: Passages, kept: Kept, queries: Queries, options: dict[str, Any], plan: Plan, screen: Screen
) -> tuple[list[Piece], list[Piece]]:
    """Encode the kept passages and all queries, block by block, on `plan.workers` actors.

    `options` are the Encoder's. Returns the encoded blocks (`ENCODED` and `vector`) of passages and of
    queries, in order; they lie in Ray's object store, which spills to disk what memory does not hold.
    """
    import ray

    reads = _reads(passages, kept, queries)
    dataset = _dataset([read for read, _ in reads], [size for _, size in reads])
    encoded = dataset.map_batches(
        _Embed,
        fn_constructor_args=(options, plan),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(plan.workers, len(reads))),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus,
    )
    total = queries.survey.total_rows
    found: list[Piece] = []
    with unwrapped(), screen.bar("encode", kept.passages + total, "texts") as bar:
        # Ray Data's own stream of references: the vectors stay where they were made
        for bundle in encoded.iter_internal_ref_bundles():
            for entry in bundle.blocks:
                if entry.metadata.num_rows:
                    found.append(Piece(entry.ref, entry.metadata.num_rows))
                    bar.update(entry.metadata.num_rows)
    border = int(np.searchsorted(np.cumsum([piece.rows for piece in found]), kept.passages)) + 1
    sums = sum(piece.rows for piece in found[:border]), sum(piece.rows for piece in found[border:])
    if sums != (kept.passages, total):
        raise RuntimeError(f"encoded {sums} passages and queries, expected {(kept.passages, total)}")
    return found[:border], found[border:]


def _reads(passages: Passages, kept: Kept, queries: Queries) -> list[tuple[Callable[[], list[pa.Table]], int]]:
    """What reads each block, passages first, and the bytes it reads."""
    import ray

    keep, ends = ray.put(kept.keep_P), kept.start_B.tolist()
    reads: list[tuple[Callable[[], list[pa.Table]], int]] = []
    for index, block in enumerate(passages.survey.blocks):
        file = passages.survey.files[block.file]
        span = ends[index], ends[index + 1]
        read = partial(_read_passages, file, block, passages.parse, passages.texts, keep, span)
        reads.append((read, _size(file, block)))
    for index, block in enumerate(queries.survey.blocks):
        file, rows = queries.survey.files[block.file], int(queries.survey.rows[index])
        read = partial(_read_queries, file, block, queries.parse, queries.known, rows)
        reads.append((read, _size(file, block)))
    return reads


def _size(file: SourceFile, block: Block) -> int:
    return file.size if file.kind == "parquet" else block.stop - block.start


def _dataset(reads: Sequence[Callable[[], list[pa.Table]]], sizes: Sequence[int]) -> Any:
    """A Ray dataset of one block for each of `reads`, whole and in order, here and after a map_batches.

    Passages and queries are one dataset, so that the actors load the model once; Ray's own `union` would deal
    their blocks in turn.
    """
    import ray
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class TextDatasource(Datasource):
        """Here, because its base is known only once Ray is imported."""

        def estimate_inmemory_data_size(self) -> int:
            return sum(sizes)

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
        ) -> list[ReadTask]:
            about = [BlockMetadata(num_rows=None, size_bytes=size, input_files=None, exec_stats=None) for size in sizes]
            return [ReadTask(read, metadata, READ) for read, metadata in zip(reads, about, strict=True)]

    dataset = ray.data.read_datasource(TextDatasource(), override_num_blocks=len(reads))
    dataset.context.target_max_block_size = None  # else Ray cuts a block above 128 MiB in two
    dataset.context.execution_options.preserve_order = True
    return dataset


def _read_passages(
    file: SourceFile,
    block: Block,
    parse: Parse,
    texts_of: Callable[[Any], Sequence[str]],
    keep: Any,
    span: tuple[int, int],
) -> list[pa.Table]:
    """The passages of a block that come first of their text."""
    import ray

    keep_P = ray.get(keep)[slice(*span)]
    found = [
        (row.offset, text)
        for row, _ in scan(file, block, parse)
        if isinstance(row, Row)
        for text in texts_of(row.value)
    ]
    _check_unchanged(file, len(found), len(keep_P))
    kept = [each for each, first in zip(found, keep_P, strict=True) if first]
    texts = [text for _, text in kept]
    return [_table(block.file, [offset for offset, _ in kept], texts, [[t] for t in texts], None, None)]


def _read_queries(
    file: SourceFile, block: Block, parse: Parse, known: Callable[[Group], Sequence[str]], rows: int
) -> list[pa.Table]:
    found = [(row, text) for row, text in scan(file, block, parse) if isinstance(row, Row)]
    _check_unchanged(file, len(found), rows)
    groups = [row.value for row, _ in found]
    return [
        _table(
            block.file,
            [row.offset for row, _ in found],
            [text for _, text in found],
            [known(group) for group in groups],
            [group.query for group in groups],
            [group.prompt for group in groups],
        )
    ]


def _check_unchanged(file: SourceFile, found: int, expected: int) -> None:
    if found != expected:
        raise UserError(f"{file.name} changed while it was in use: a part that held {expected:,} texts holds {found:,}")


def _table(
    file: int,
    offsets: list[int],
    texts: list[str],
    known: Sequence[Sequence[str]],
    queries: list[str] | None,
    prompts: list[str | None] | None,
) -> pa.Table:
    words = words_of([text_key(text) for texts in known for text in texts])
    ends = np.cumsum([0] + [2 * len(texts) for texts in known])
    nothing = [None] * len(texts)
    columns = [
        pa.array([file] * len(texts), pa.int32()),
        pa.array(offsets, pa.int64()),
        pa.array(texts, pa.large_string()),
        pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(words.ravel(), pa.uint64())),
        pa.array(queries or nothing, pa.large_string()),
        pa.array(prompts or nothing, pa.large_string()),
    ]
    return pa.Table.from_arrays(columns, schema=READ)


class _Embed:
    """The Ray Data actor: takes a block as it is read (`READ`), gives it encoded (`ENCODED`, `vector`)."""

    def __init__(self, options: dict[str, Any], plan: Plan) -> None:
        import torch

        from raybge.model.encoder import Encoder
        from raybge.model.folder import Instructions

        torch.set_num_threads(plan.cpus)
        self._encoder = Encoder(**options, devices="cuda:0" if plan.gpus else "cpu")
        # put in front here and not by the encoder: a row may have a prompt of its own
        self._instructions = self._encoder.instructions
        self._encoder.instructions = Instructions(query="", passage="")

    def __call__(self, table: pa.Table) -> pa.Table:
        queries, prompts = table["query"].to_pylist(), table["prompt"].to_pylist()
        if queries and queries[0] is not None:
            texts = [self._instructions.query_text(q, p) for q, p in zip(queries, prompts, strict=True)]
            vectors_ND = self._encoder.encode_queries(texts, convert_to_numpy=True)
        else:
            texts = [self._instructions.passage_text(text) for text in table["text"].to_pylist()]
            vectors_ND = self._encoder.encode_corpus(texts, convert_to_numpy=True)
        if not np.isfinite(vectors_ND).all():
            raise RuntimeError("the model gives vectors with inf or nan: try without half precision")
        flat = pa.array(np.asarray(vectors_ND).ravel(), pa.float32())
        vectors = pa.FixedSizeListArray.from_arrays(flat, self._encoder.dim)
        return table.drop_columns(["query", "prompt"]).append_column("vector", vectors)
