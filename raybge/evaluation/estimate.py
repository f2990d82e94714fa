"""What an evaluation will take, told before it starts: from what one worker does with a sample of the passages."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from raybge.cluster.remote_calls import unwrap_user_errors
from raybge.cluster.resources import Plan
from raybge.data.jsonl import Row, scan
from raybge.data.survey import Survey
from raybge.search.embedder import Embedder, TextEncoder, device_of
from raybge.search.faiss_index import IndexKind, empty_index
from raybge.search.search_data import Passages, SearchData

PROBED = 10_000  # texts from which on it is worth loading the model once more
BLOCKS = 8  # that the sample comes from, evenly over the files
SAMPLE = {"cpu": 256, "cuda:0": 8192}  # texts
SEARCHED = 20_000, 64  # vectors and queries of the trial search


def estimate(
    data: SearchData, embedder: Embedder, plan: Plan, kind: IndexKind, loaded: bool, k: int
) -> str | None:
    """The plan line on time and room; None for so few texts that they are done before it would be known.

    Args:
        loaded: the passages' vectors are there already.
    """
    import ray

    passages, count, rows = data.passages, data.unique.passages, data.queries.survey.total_rows
    texts = rows + (0 if loaded else count)
    if texts < PROBED:
        return None
    probe = ray.remote(_probe).options(num_cpus=plan.cpus, num_gpus=plan.gpus)
    with unwrap_user_errors():
        rate, pairs = ray.get(probe.remote(passages, embedder, plan, kind, k))
    encoding, room = texts / (rate * plan.workers), count * embedder.dim * 4 / 1e9
    said = f"encoding {texts:,} texts {spoken(encoding)} ({rate:,.0f} a second on one of {plan.workers:,} workers)"
    seconds = encoding
    if pairs:
        searching = rows * count / (pairs * plan.workers)
        said += f", searching {spoken(searching)}"
        seconds += searching
    if plan.gpus:
        said += f"; {seconds / 3600 * plan.gpus * plan.workers:,.1f} GPU hours"
    return f"estimate: {said}; {room:,.1f} GB of vectors"


def spoken(seconds: float) -> str:
    """A time to plan with: seconds, minutes or hours."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}" if seconds < 10 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} s"


def _probe(passages: Passages, embedder: Embedder, plan: Plan, kind: IndexKind, k: int) -> tuple[float, float | None]:
    """Texts encoded in a second; pairs of query and passage scored in one, where the search is exact."""
    device = device_of(plan)
    texts, encode = sample(passages, SAMPLE[device]), TextEncoder(embedder, device)
    encode(texts[: len(texts) // 8], "passage")  # loading and warming up are not counted
    start = time.perf_counter()
    e_ND = encode(texts, "passage")
    rate = len(texts) / (time.perf_counter() - start)
    return rate, _pairs_a_second(e_ND, kind, k, plan.cpus) if kind.exact else None


def _pairs_a_second(e_ND: np.ndarray, kind: IndexKind, k: int, threads: int) -> float:
    import faiss

    faiss.omp_set_num_threads(threads)
    size, queries = SEARCHED
    index: Any = empty_index(e_ND.shape[1], kind)
    index.add(np.resize(e_ND, (size, e_ND.shape[1])))
    q_QD = np.resize(e_ND, (queries, e_ND.shape[1]))
    index.search(q_QD, k)
    start = time.perf_counter()
    index.search(q_QD, k)
    return size * queries / (time.perf_counter() - start)


def sample(passages: Passages, most: int) -> list[str]:
    """Up to `most` passages from some blocks that lie evenly over the files."""
    survey: Survey = passages.survey
    numbers = np.unique(np.linspace(0, len(survey.blocks) - 1, BLOCKS).astype(int))
    found: list[str] = []
    for number in numbers:
        block = survey.blocks[number]
        texts: list[str] = []
        for row, _ in scan(survey.files[block.file], block, passages.parse):
            if isinstance(row, Row):
                texts += passages.texts(row.value)
            if len(texts) >= -(-most // len(numbers)):
                break
        found += texts
    return found[:most]
