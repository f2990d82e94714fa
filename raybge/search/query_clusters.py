"""Clusters of the queries of training groups: k-means on a sample of their vectors, then the cluster of each query.

Rows are read in parts that are cut by the data alone, so that labels do not depend on the number of actors. A process
holds the vectors of one part and the centroids; k-means, in a task of its own, holds the sample. The driver writes 2
bytes a row. Queries of the sample are encoded twice: storing the vectors of all would be the larger cost.

Letters in array names: N rows, C clusters, D width of a vector, B blocks.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.cli.console import Console
from raybge.cluster.remote_calls import ray_is_connected, unwrap_user_errors
from raybge.cluster.resources import Plan
from raybge.data.jsonl import Block, Parse, Row, SourceFile, scan
from raybge.data.mixture import generator
from raybge.data.ray_datasets import BlockRead, batches_of, dataset_of_reads
from raybge.data.survey import Survey
from raybge.search.actor_pool import map_on_actors
from raybge.search.columns import vectors_column, vectors_of
from raybge.search.embedder import Embedder, TextEncoder, device_of
from raybge.search.kmeans import nearest_centroids, train_centroids, unit_vectors
from raybge.util.errors import UserError

PART_ROWS, PART_BYTES = 2048, 64 << 20  # rows that are encoded at a time, and bytes of their blocks
SAMPLED_ROWS = 64  # of each cluster
SAMPLE_BYTES = 256 << 20  # of the sample's vectors
READ_ROWS = 4  # rows of the parts that are read for a row of the sample
# `row`: number among all rows of the data. `vector` replaces the texts if the vectors are saved.
_TEXTS = pa.schema([("row", pa.int64()), ("query", pa.large_string()), ("prompt", pa.large_string())])


@dataclass(frozen=True)
class QueryVectors:
    """Source of the queries' vectors: a model, or a file of saved vectors with a row for each row of the data.

    Args:
        dim: width of the vectors.
        embedder: the model; None: the file.
        path: .npy file (N, D) that all nodes share.
    """

    dim: int
    embedder: Embedder | None = None
    path: str | None = None


@dataclass(frozen=True)
class QueryPart:
    """Read task of the queries of adjacent blocks.

    Args:
        file: the file.
        blocks: its blocks.
        first_row: number of their first row among all rows of the data.
        rows: their rows.
        parse: parser of a group.
        path: file of saved vectors, which are read instead of the texts.
        wanted: numbers of the rows to read, from 0 for the first of the part; None: all.
    """

    file: SourceFile
    blocks: Sequence[Block]
    first_row: int
    rows: int
    parse: Parse
    path: str | None
    wanted: np.ndarray | None = None

    def __call__(self) -> list[pa.Table]:
        """Return the rows as one table."""
        number_N = np.arange(self.rows) if self.wanted is None else self.wanted
        row_N = pa.array(self.first_row + number_N, pa.int64())
        if self.path:
            vectors_ND = np.load(self.path, mmap_mode="r")[self.first_row + number_N]
            return [pa.table({"row": row_N, "vector": vectors_column(vectors_ND.astype(np.float32))})]
        groups = [
            row.value for block in self.blocks for row, _ in scan(self.file, block, self.parse) if isinstance(row, Row)
        ]
        if len(groups) != self.rows:
            raise UserError(
                f"{self.file.name} changed during the run: {self.rows:,} rows were {len(groups):,} when read again"
            )
        chosen = [groups[i] for i in number_N]
        texts = [group.query for group in chosen], [group.prompt for group in chosen]
        columns = [row_N, *(pa.array(each, pa.large_string()) for each in texts)]
        return [pa.Table.from_arrays(columns, schema=_TEXTS)]


class QueryClusterActor:
    """Ray Data actor: maps queries to vectors, and with centroids to the number of their cluster."""

    def __init__(self, vectors: QueryVectors, device: str, centroids_CD: np.ndarray | None) -> None:
        """Remember the model; it is loaded at the first part.

        Args:
            vectors: source of the vectors.
            device: torch device.
            centroids_CD: centroids; None: return the vectors.
        """
        self._encode = TextEncoder(vectors.embedder, device) if vectors.embedder else None
        self._centroids_CD = centroids_CD
        self._instructions: Any = None

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the columns `row` and `label`, or `row` and `vector` without centroids."""
        if self._encode is None:
            vectors_ND = vectors_of(table)
        else:
            with self._encode.lock:
                if self._instructions is None:
                    self._instructions = self._encode.take_instructions()
                pairs = zip(table["query"].to_pylist(), table["prompt"].to_pylist(), strict=True)
                vectors_ND = self._encode([self._instructions.query_text(*pair) for pair in pairs], "query")
        vectors_ND = unit_vectors(vectors_ND)
        if self._centroids_CD is None:
            return pa.table({"row": table["row"], "vector": vectors_column(vectors_ND)})
        return pa.table({"row": table["row"], "label": nearest_centroids(vectors_ND, self._centroids_CD)})


def cluster_queries(
    survey: Survey,
    parse: Parse,
    vectors: QueryVectors,
    clusters: int,
    seed: int,
    plan: Plan,
    label_N: np.ndarray,
    console: Console,
) -> None:
    """Cluster the queries of a survey and write the number of each one's cluster.

    Neighbors among the numbers are similar clusters. Runs on Ray if it is connected, else in this process.

    Args:
        survey: the groups.
        parse: parser of a group.
        vectors: source of the vectors.
        clusters: number of clusters.
        seed: seed of the sample and of k-means.
        plan: actors and their resources.
        label_N: receives the numbers, uint16.
        console: shows the progress.
    """
    parts = query_parts(survey, parse, vectors.path)
    sample = sampled_parts(parts, sample_size(survey.total_rows, clusters, vectors.dim), seed)
    with console.phase("clustering a sample of the queries"):
        centroids_CD = _centroids(sample, vectors, clusters, seed, plan)
    done = 0
    tables = _mapped(parts, vectors, centroids_CD, plan)
    with console.bar("cluster", survey.total_rows, "query") as bar, closing(tables):
        for table in tables:
            label_N[table["row"].to_numpy()] = table["label"].to_numpy()
            done += len(table)
            bar.update(len(table))
    if done != survey.total_rows:
        raise RuntimeError(f"clustered {done} queries of {survey.total_rows}")


def sample_size(rows: int, clusters: int, dim: int) -> int:
    """Return the rows of the sample: 64 for each cluster, in at most 256 MiB, but one for each cluster."""
    return min(rows, max(clusters, min(SAMPLED_ROWS * clusters, SAMPLE_BYTES // (4 * dim))))


def query_parts(survey: Survey, parse: Parse, path: str | None) -> list[QueryPart]:
    """Cut a survey into parts of about 2,048 rows, or of blocks of 64 MiB if these have fewer rows.

    Args:
        survey: the groups.
        parse: parser of a group.
        path: file of saved vectors.

    Returns:
        The parts that have rows, in order.
    """
    parts: list[QueryPart] = []
    first, first_row, rows, size = 0, 0, 0, 0
    for number, block in enumerate(survey.blocks):
        rows += int(survey.rows[number])
        size += block.stop - block.start
        following = number + 1
        last = following == len(survey.blocks) or survey.blocks[following].file != block.file
        if last or rows >= PART_ROWS or size >= PART_BYTES:
            if rows:
                parts.append(
                    QueryPart(survey.files[block.file], survey.blocks[first:following], first_row, rows, parse, path)
                )
            first, first_row, rows, size = following, first_row + rows, 0, 0
    return parts


def sampled_parts(parts: Sequence[QueryPart], size: int, seed: int) -> list[QueryPart]:
    """Draw a sample of rows; of much data only some parts are read.

    Args:
        parts: all parts.
        size: rows of the sample.
        seed: seed of the draw.

    Returns:
        Parts that read the rows of the sample, in order.
    """
    random = generator("clusters", seed)
    shuffled = random.permutation(len(parts))
    rows_P = np.array([parts[i].rows for i in shuffled])
    enough = int(np.searchsorted(np.cumsum(rows_P), READ_ROWS * size)) + 1
    chosen = sorted(shuffled[:enough].tolist())
    ends = np.cumsum([parts[i].rows for i in chosen])
    picked = np.sort(random.choice(int(ends[-1]), size, replace=False))
    result = []
    for i, end in zip(chosen, ends.tolist(), strict=True):
        part = parts[i]
        start = end - part.rows
        wanted = picked[np.searchsorted(picked, start) : np.searchsorted(picked, end)] - start
        if len(wanted):
            result.append(replace(part, wanted=wanted))
    return result


def _centroids(sample: Sequence[QueryPart], vectors: QueryVectors, clusters: int, seed: int, plan: Plan) -> np.ndarray:
    """Encode the sample and cluster it; on Ray, no vector reaches this process."""
    if not ray_is_connected():
        return _centroids_of(list(_mapped(sample, vectors, None, plan)), clusters, seed)
    import ray

    with unwrap_user_errors():
        tables = _dataset(sample, vectors, None, plan).materialize().to_arrow_refs()
        train = ray.remote(_centroids_of_references).options(num_cpus=1)
        centroids_CD: np.ndarray = ray.get(train.remote(tables, clusters, seed))
    return centroids_CD


def _centroids_of_references(references: list[Any], clusters: int, seed: int) -> np.ndarray:
    import ray

    return _centroids_of(ray.get(references), clusters, seed)


def _centroids_of(tables: list[pa.Table], clusters: int, seed: int) -> np.ndarray:
    """Return the centroids of the vectors of some tables."""
    table = pa.concat_tables(tables).sort_by("row")
    return train_centroids(vectors_of(table), clusters, seed)


def _mapped(
    parts: Sequence[QueryPart], vectors: QueryVectors, centroids_CD: np.ndarray | None, plan: Plan
) -> Generator[pa.Table, None, None]:
    """Yield the result of `QueryClusterActor` for each part, in order."""
    if not ray_is_connected():
        actor = QueryClusterActor(vectors, device_of(plan), centroids_CD)
        for part in parts:
            yield from map(actor, part())
        return
    with unwrap_user_errors(), batches_of(_dataset(parts, vectors, centroids_CD, plan)) as batches:
        yield from batches


def _dataset(parts: Sequence[QueryPart], vectors: QueryVectors, centroids_CD: np.ndarray | None, plan: Plan) -> Any:
    schema = pa.schema([("row", pa.int64()), ("vector", pa.list_(pa.float32(), vectors.dim))])
    dataset = dataset_of_reads([BlockRead(part) for part in parts], schema if vectors.path else _TEXTS)
    dataset.context.enable_progress_bars = False
    return map_on_actors(dataset, QueryClusterActor, (vectors, device_of(plan), centroids_CD), plan, len(parts))
