"""From files to vectors on Ray: what is read is encoded on Ray Data actors and kept in the store.

What is encoded together is cut by the data alone, never by the number of actors, so that the vectors are the
same for any number of them. Texts and vectors never pass through the driver: it holds a name and a number for each
block. A block that the store holds is not encoded again, so a run that was killed goes on where it was.

Letters in array names: P passages (duplicates counted), B blocks, N texts, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.cli.console import Console
from raybge.cluster.remote_calls import unwrapped
from raybge.cluster.resources import Plan
from raybge.data.groups import Group, text_key
from raybge.data.jsonl import Block, Parse, Row, scan
from raybge.data.source_files import SourceFile
from raybge.data.survey import Survey
from raybge.search.deduplication import Elsewhere, Kept, Texts
from raybge.search.saved_vectors import Embeddings
from raybge.search.shards import words_of
from raybge.search.store import Piece, Store, table_digest
from raybge.util.errors import UserError

Key = Callable[[str], bytes]

# One encoded block, passages or queries. `text`: the passage, or the query's row as JSON. `id`: what a passage goes by,
# null where that is its text. `known`: keys as
# pairs of words: the passage's own, or those of `Queries.known`. `vector` follows, D float32; of queries whose
# positives are encoded too, `pos_scores`: their inner products with the query.
ENCODED = pa.schema(
    [
        ("file", pa.int32()),
        ("offset", pa.int64()),
        ("text", pa.large_string()),
        ("id", pa.large_string()),
        ("known", pa.large_list(pa.uint64())),
    ]
)
# What an actor is given: of a query also its text, its own prompt and the positives to encode; null for passages.
# `block`: the number of the block among all.
READ = pa.schema(
    [
        *ENCODED,
        ("query", pa.large_string()),
        ("prompt", pa.large_string()),
        ("positives", pa.large_list(pa.large_string())),
        ("block", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Passages:
    """The pool before duplicates are dropped: `texts` gives the passages of one parsed row, `key` what they are
    looked up by.
    """

    survey: Survey
    parse: Parse
    texts: Texts
    key: Key = text_key


@dataclass(frozen=True)
class Queries:
    """Rows that parse to a Group. `known` names the texts whose passages a search must also give, found by `key`, and
    `elsewhere` more of their keys. With `encode_positives` their inner products with the query are computed too.
    """

    survey: Survey
    parse: Parse
    known: Callable[[Group], Sequence[str]]
    key: Key = text_key
    elsewhere: Elsewhere | None = None
    encode_positives: bool = False


@dataclass(frozen=True)
class Embedder:
    """What makes vectors: `make` is called once in each actor that needs it, with the device, and gives an Encoder.

    Args:
        make: it also sets how many threads the process may use.
        identity: changes when the vectors would.
        dim: their width, for the plan of the memory.
    """

    make: Callable[[str], Any]
    identity: str
    dim: int


def passage_itself(text: str) -> Sequence[str]:
    return (text,)


def passages_of_group(group: Group) -> Sequence[str]:
    return group.pos + group.neg


def encode(
    passages: Passages,
    kept: Kept,
    queries: Queries,
    embedder: Embedder,
    store: Store,
    plan: Plan,
    console: Console,
    loaded: Embeddings | None = None,
) -> tuple[list[Piece], list[Piece]]:
    """Encode the kept passages and all queries, block by block, on `plan.workers` actors, into the store.

    Where vectors of the passages were `loaded` these are taken. Returns the blocks (`ENCODED` and `vector`) of passages
    and of queries, in order.
    """
    import ray

    reads = _reads(passages, kept, queries)
    dataset = _dataset([read for read, _ in reads], [size for _, size in reads])
    encoded = dataset.map_batches(
        _Embed,
        fn_constructor_args=(embedder, store, plan, loaded and Loaded(loaded, np.cumsum(kept.kept_B) - kept.kept_B)),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(plan.workers, len(reads))),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus,
    )
    total = queries.survey.total_rows
    found: dict[int, Piece] = {}
    with unwrapped(), console.bar("encode", kept.passages + total, "texts") as bar:
        for said in encoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for done in said.to_pylist():
                found[done["block"]] = Piece(done["name"], done["rows"], done["texts"])
                bar.update(done["rows"])
    border = len(passages.survey.blocks)
    pieces = [found[number] for number in sorted(found) if number < border and found[number].rows]
    rows = [found[number] for number in sorted(found) if number >= border and found[number].rows]
    sums = sum(piece.rows for piece in pieces), sum(piece.rows for piece in rows)
    if sums != (kept.passages, total):
        raise RuntimeError(f"encoded {sums} passages and queries, expected {(kept.passages, total)}")
    return pieces, rows


# --- reading ----------------------------------------------------------------------------------------------


def _reads(passages: Passages, kept: Kept, queries: Queries) -> list[tuple[Callable[[], list[pa.Table]], int]]:
    """What reads each block, passages first, and the bytes it reads. A survey is too large to go with each."""
    reads: list[tuple[Callable[[], list[pa.Table]], int]] = []
    for index, block in enumerate(passages.survey.blocks):
        file = passages.survey.files[block.file]
        read = partial(
            _read_passages, index, file, block, passages.parse, passages.texts, passages.key, kept.reader(index)
        )
        reads.append((read, _size(file, block)))
    for index, block in enumerate(queries.survey.blocks):
        file, rows = queries.survey.files[block.file], int(queries.survey.rows[index])
        elsewhere = queries.elsewhere.reader(index) if queries.elsewhere else None
        known = partial(_known, queries.known, queries.key)
        number = len(passages.survey.blocks) + index
        read = partial(
            _read_queries, number, file, block, queries.parse, known, elsewhere, queries.encode_positives, rows
        )
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
    number: int,
    file: SourceFile,
    block: Block,
    parse: Parse,
    texts_of: Texts,
    key: Key,
    keep: Callable[[], np.ndarray],
) -> list[pa.Table]:
    """The passages of a block that come first of their text."""
    keep_P = keep()
    found = [
        (row.offset, text)
        for row, _ in scan(file, block, parse)
        if isinstance(row, Row)
        for text in texts_of(row.value)
    ]
    _check_unchanged(file, len(found), len(keep_P))
    kept = [each for each, first in zip(found, keep_P, strict=True) if first]
    keys_N2 = words_of([key(text) for _, text in kept])
    return [_table(number, block.file, kept, [keys_N2[n : n + 1] for n in range(len(kept))])]


def _known(known: Callable[[Group], Sequence[str]], key: Key, group: Group) -> np.ndarray:
    return words_of([key(text) for text in known(group)])


def _read_queries(
    number: int,
    file: SourceFile,
    block: Block,
    parse: Parse,
    known: Callable[[Group], np.ndarray],
    elsewhere: Callable[[], list[np.ndarray]] | None,
    encode_positives: bool,
    rows: int,
) -> list[pa.Table]:
    found = [(row, text) for row, text in scan(file, block, parse) if isinstance(row, Row)]
    _check_unchanged(file, len(found), rows)
    groups = [row.value for row, _ in found]
    keys = [known(group) for group in groups]
    if elsewhere:
        keys = [np.concatenate(each) for each in zip(keys, elsewhere(), strict=True)]
    positives = [group.pos for group in groups] if encode_positives else None
    return [_table(number, block.file, [(row.offset, text) for row, text in found], keys, groups, positives)]


def _check_unchanged(file: SourceFile, found: int, expected: int) -> None:
    if found != expected:
        raise UserError(f"{file.name} changed while it was in use: a part that held {expected:,} texts holds {found:,}")


def _table(
    number: int,
    file: int,
    rows: Sequence[tuple[int, str]],
    keys: Sequence[np.ndarray],
    groups: Sequence[Group] | None = None,
    positives: Sequence[Sequence[str]] | None = None,
) -> pa.Table:
    """A block of `READ` of rows (offset, text); `keys` are (K, 2) for each."""
    words = np.concatenate([np.zeros(0, np.uint64), *(each.ravel() for each in keys)])
    ends = np.cumsum([0] + [each.size for each in keys])
    nothing = [None] * len(rows)
    columns = [
        pa.array([file] * len(rows), pa.int32()),
        pa.array([offset for offset, _ in rows], pa.int64()),
        pa.array([text for _, text in rows], pa.large_string()),
        pa.array([getattr(text, "id", None) for _, text in rows], pa.large_string()),
        pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(words, pa.uint64())),
        pa.array([group.query for group in groups] if groups else nothing, pa.large_string()),
        pa.array([group.prompt for group in groups] if groups else nothing, pa.large_string()),
        pa.array(positives or nothing, pa.large_list(pa.large_string())),
        pa.array([number] * len(rows), pa.int64()),
    ]
    return pa.Table.from_arrays(columns, schema=READ)


def finite(vectors_ND: Any) -> np.ndarray:
    """The vectors in fp32. RuntimeError where they are none."""
    if not np.isfinite(vectors_ND).all():
        raise RuntimeError("the model gives vectors with inf or nan: try without half precision")
    return np.ascontiguousarray(vectors_ND, np.float32)


# --- encoding ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """Vectors of passages that are there already, and the first one of each block."""

    embeddings: Embeddings
    start_B: np.ndarray


class _Embed:
    """The Ray Data actor: takes a block as it is read (`READ`), says where it lies encoded.

    The model is loaded when a block comes that the store does not hold.
    """

    def __init__(self, embedder: Embedder, store: Store, plan: Plan, loaded: Loaded | None = None) -> None:
        self._embedder, self._store, self._plan, self._loaded = embedder, store, plan, loaded
        self._encoder: Any = None

    def __call__(self, table: pa.Table) -> pa.Table:
        if not len(table):
            nothing = pa.array([], pa.string())
            return pa.table({"block": pa.array([], pa.int64()), "name": nothing, "rows": [], "texts": nothing})
        number = table["block"][0].as_py()
        table = table.drop_columns(["block"])
        texts = table_digest(table.select(["text", "id"]))
        vectors_ND, source = self._vectors(number, len(table))
        name = table_digest(table, self._embedder.identity, source)
        if not self._store.has(name):
            self._store.write_table(name, self.encoded(table, vectors_ND))
        return pa.table({"block": [number], "name": [name], "rows": [len(table)], "texts": [texts]})

    def _vectors(self, number: int, rows: int) -> tuple[np.ndarray | None, str]:
        """A block's vectors where they were loaded, and a name for where they come from."""
        if self._loaded is None or number >= len(self._loaded.start_B):
            return None, ""
        found = self._loaded.embeddings
        return found.vectors(int(self._loaded.start_B[number]), rows), found.texts

    def encoded(self, table: pa.Table, vectors_ND: np.ndarray | None = None) -> pa.Table:
        """The block with its vectors, those that are given or the model's."""
        if self._encoder is None and vectors_ND is None:
            self._load()
        queries, prompts = table["query"].to_pylist(), table["prompt"].to_pylist()
        if vectors_ND is not None:
            vectors_ND = finite(vectors_ND)
        elif queries[0] is not None:
            texts = [self._instructions.query_text(q, p) for q, p in zip(queries, prompts, strict=True)]
            vectors_ND = finite(self._encoder.encode_queries(texts, convert_to_numpy=True))
        else:
            vectors_ND = self._passages(table["text"].to_pylist())
        positives = table["positives"].combine_chunks()
        flat = pa.array(vectors_ND.ravel(), pa.float32())
        table = table.drop_columns(["query", "prompt", "positives"])
        table = table.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1]))
        if positives.null_count == 0:
            of_N = np.repeat(np.arange(len(table)), positives.value_lengths().to_numpy())
            scores = np.einsum("nd,nd->n", vectors_ND[of_N], self._passages(positives.flatten().to_pylist()))
            scores = pa.LargeListArray.from_arrays(positives.offsets, pa.array(scores, pa.float32()))
            table = table.append_column("pos_scores", scores)
        return table

    def _passages(self, texts: list[str]) -> np.ndarray:
        instructed = [self._instructions.passage_text(text) for text in texts]
        return finite(self._encoder.encode_corpus(instructed, convert_to_numpy=True))

    def _load(self) -> None:
        from raybge.data.prompts import Instructions

        self._encoder = self._embedder.make("cuda:0" if self._plan.gpus else "cpu")
        # put in front here and not by the encoder: a row may have a prompt of its own
        self._instructions = self._encoder.instructions
        self._encoder.instructions = Instructions(query="", passage="")
