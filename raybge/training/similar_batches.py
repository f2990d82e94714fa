"""Clusters of the queries of a run, computed before its workers start and cached in the run's cache folder.

A run that continues finds the clusters of its first start, so that its order is the same on another machine too.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raybge.cluster.resources import Plan
from raybge.data.similar_rows import SimilarRows, open_similar_rows, sort_by_cluster
from raybge.model.model_identity import model_identity
from raybge.search.query_clusters import QueryVectors, cluster_queries
from raybge.training.similarity_spec import SimilaritySpec
from raybge.util.digest import digest, fingerprint
from raybge.util.errors import UserError
from raybge.util.plural import plural

if TYPE_CHECKING:
    from raybge.cli.console import Console
    from raybge.training.spec import TrainingData
    from raybge.training.worker_config import PlannedRun

_FORMAT = 1  # of the files: increment when another version would cluster the same rows differently


def with_similar_batches(planned: PlannedRun, console: Console) -> PlannedRun:
    """Return the run with steps of similar queries if its spec asks for them.

    A dry run clusters only where it continues a run, whose order is compared.

    Args:
        planned: the run, in random order.
        console: shows the progress.

    Returns:
        The run.

    Raises:
        UserError: the saved vectors are of other rows, or a file changed.
    """
    spec = planned.spec.similarity
    if spec is None or (planned.spec.run.dry_run and not planned.start):
        return planned
    data = planned.data
    clusters = spec.cluster_count(data.order)
    if spec.vectors and spec.vectors.rows != data.survey.total_rows:
        raise UserError(
            f"--batch_vectors {spec.vectors.path} holds {plural(spec.vectors.rows, 'vector')}, but --train_data has "
            f"{plural(data.survey.total_rows, 'usable row')}; encode the same files"
        )
    path = planned.spec.run.cache / f"similar-{_key(spec, data, clusters)}.npy"
    similar = _load(path, clusters)
    if similar is None:
        similar = _cluster(planned, spec, clusters, path, console)
    sizes_C = np.diff(similar.starts_C)
    console.info(
        f"clusters: {plural(int((sizes_C > 0).sum()), 'cluster')} of {int(sizes_C.min()):,} to {int(sizes_C.max()):,} "
        f"queries, median {int(np.median(sizes_C)):,}"
    )
    return replace(planned, data=replace(data, order=data.order.with_similar(similar)))


def _key(spec: SimilaritySpec, data: TrainingData, clusters: int) -> str:
    """Return a digest of everything that the clusters depend on; not of the device, see the head of the file."""
    order, mixture = data.order, data.order.mixture
    encoder = replace(spec.encoder, model_name_or_path="", token=None)
    source: object = model_identity(spec.encoder.model_name_or_path, spec.encoder.cache_dir), encoder.keywords()
    if spec.vectors:
        status = os.stat(spec.vectors.path)
        source = spec.vectors.path, status.st_size, status.st_mtime_ns
    files = [(os.path.basename(file.name), file.size, file.mtime_ns) for file in data.survey.files]
    return digest(_FORMAT, fingerprint((files, data.survey.rows, mixture)), source, clusters, order.seed)


def _load(path: Path, clusters: int) -> SimilarRows | None:
    """Return the cached clusters; None if there are none."""
    starts = _starts_path(path)  # written last
    if not (path.exists() and starts.exists()):
        return None
    return open_similar_rows(str(path), np.load(starts), clusters)


def _cluster(planned: PlannedRun, spec: SimilaritySpec, clusters: int, path: Path, console: Console) -> SimilarRows:
    data, plan = planned.data, planned.plan
    # One core an actor, as in mining: with more, vectors would differ in their last bits.
    actors = plan if plan.gpus else Plan(plan.workers * plan.cpus, 1, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    parse, rows = planned.spec.task.row_parser, data.survey.total_rows
    try:
        label_N = np.lib.format.open_memmap(labels, "w+", np.uint16, (rows,))
        cluster_queries(data.survey, parse, _vectors(spec, actors), clusters, data.order.seed, actors, label_N, console)
        similar = sort_by_cluster(
            str(path),
            lambda start, stop: np.array(label_N[start:stop]),
            data.order.rows,
            data.order.mixture,
            clusters,
            data.order.seed,
        )
    finally:
        labels.unlink(missing_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.npy")
    np.save(partial, similar.starts_C)
    os.replace(partial, _starts_path(path))
    return similar


def _vectors(spec: SimilaritySpec, plan: Plan) -> QueryVectors:
    from raybge.search.embedder import make_embedder

    if spec.vectors:
        return QueryVectors(spec.vectors.dim, path=spec.vectors.path)
    embedder = make_embedder(spec.encoder, plan)
    return QueryVectors(embedder.dim, embedder)


def _starts_path(path: Path) -> Path:
    return path.with_suffix(".starts.npy")
