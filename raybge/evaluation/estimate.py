"""Estimate of an evaluation's time and space, extrapolated from what one worker does with a sample of the passages.

Letters in array names: N passages, Q queries, D width of a vector.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from raybge.cluster.remote_calls import unwrap_user_errors
from raybge.cluster.resources import Plan
from raybge.data.jsonl import Row, scan
from raybge.search.embedder import Embedder, TextEncoder, device_of
from raybge.search.faiss_index import IndexKind, empty_index
from raybge.search.search_data import Passages, SearchData

MIN_TEXTS = 10_000  # from this number on an estimate is worth loading the model once more
SAMPLE_BLOCKS = 8  # blocks that the sample is taken from, evenly spaced over the files
SAMPLE_TEXTS = {"cpu": 256, "cuda:0": 8192}
TRIAL_VECTORS, TRIAL_QUERIES = 20_000, 64  # of the trial search


def estimate(
    data: SearchData, embedder: Embedder, plan: Plan, kind: IndexKind, k: int, passages_saved: bool
) -> str | None:
    """Return the plan line on time and space.

    Args:
        data: corpus and queries.
        embedder: the model.
        plan: workers and their resources.
        kind: index type.
        k: number of passages per query.
        passages_saved: the passages' vectors are read from a file.

    Returns:
        The line; None for so few texts that the run takes no longer than the estimate.
    """
    import ray

    passages, queries = data.unique.passages, data.queries.survey.total_rows
    texts = queries + (0 if passages_saved else passages)
    if texts < MIN_TEXTS:
        return None
    trial = ray.remote(_trial_rates).options(num_cpus=plan.cpus, num_gpus=plan.gpus)
    with unwrap_user_errors():
        texts_per_second, pairs_per_second = ray.get(trial.remote(data.passages, embedder, plan, kind, k))
    seconds = texts / (texts_per_second * plan.workers)
    parts = (
        f"encoding {texts:,} texts {format_time(seconds)} ({texts_per_second:,.0f} per second on one of "
        f"{plan.workers:,} workers)"
    )
    if pairs_per_second:
        searching = queries * passages / (pairs_per_second * plan.workers)
        parts += f", searching {format_time(searching)}"
        seconds += searching
    if plan.gpus:
        parts += f"; {seconds / 3600 * plan.gpus * plan.workers:,.1f} GPU hours"
    return f"estimate: {parts}; {passages * embedder.dim * 4 / 1e9:,.1f} GB of vectors"


def format_time(seconds: float) -> str:
    """Format an approximate duration in seconds, minutes or hours."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}" if seconds < 10 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} s"


def _trial_rates(
    passages: Passages, embedder: Embedder, plan: Plan, kind: IndexKind, k: int
) -> tuple[float, float | None]:
    """Measure texts encoded per second, and (query, passage) pairs scored per second if the search is exact."""
    device = device_of(plan)
    texts, encode = sample_passages(passages, SAMPLE_TEXTS[device]), TextEncoder(embedder, device)
    encode(texts[: len(texts) // 8], "passage")  # excludes loading and warming up from the measurement
    start = time.perf_counter()
    e_ND = encode(texts, "passage")
    texts_per_second = len(texts) / (time.perf_counter() - start)
    return texts_per_second, _pairs_per_second(e_ND, kind, k, plan.cpus) if kind.exact else None


def _pairs_per_second(e_ND: np.ndarray, kind: IndexKind, k: int, threads: int) -> float:
    import faiss

    threads_before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        index: Any = empty_index(e_ND.shape[1], kind)
        index.add(np.resize(e_ND, (TRIAL_VECTORS, e_ND.shape[1])))
        q_QD = np.resize(e_ND, (TRIAL_QUERIES, e_ND.shape[1]))
        index.search(q_QD, k)
        start = time.perf_counter()
        index.search(q_QD, k)
        return TRIAL_VECTORS * TRIAL_QUERIES / (time.perf_counter() - start)
    finally:
        faiss.omp_set_num_threads(threads_before)


def sample_passages(passages: Passages, max_texts: int) -> list[str]:
    """Return up to `max_texts` passages from a few blocks that are evenly spaced over the files."""
    survey = passages.survey
    numbers = np.unique(np.linspace(0, len(survey.blocks) - 1, SAMPLE_BLOCKS).astype(int))
    texts: list[str] = []
    for number in numbers:
        block = survey.blocks[number]
        block_texts: list[str] = []
        for row, _ in scan(survey.files[block.file], block, passages.parse):
            if isinstance(row, Row):
                block_texts += passages.texts(row.value)
            if len(block_texts) >= -(-max_texts // len(numbers)):
                break
        texts += block_texts
    return texts[:max_texts]
