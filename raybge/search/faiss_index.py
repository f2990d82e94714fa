"""faiss indexes of one shard: kinds, construction on CPU or GPU, and checks before any data is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from raybge.util.errors import UserError

GPU_MAX_CANDIDATES = 2048  # faiss returns at most so many candidates per query on a GPU
FLAT = "Flat"


@dataclass(frozen=True)
class IndexKind:
    """Index type of a shard: any faiss factory string ("Flat" is exact), on the CPU or a GPU."""

    factory: str = FLAT
    gpu: bool = False

    @property
    def exact(self) -> bool:
        """True if the index finds the exact nearest passages."""
        return self.factory == FLAT


@cache
def _gpu_resources() -> Any:
    """Return the faiss GPU resources of this process: each instance reserves memory of its own."""
    import faiss

    return faiss.StandardGpuResources()


def empty_index(dim: int, kind: IndexKind) -> Any:
    """Create an empty inner-product index.

    Args:
        dim: width of the vectors.
        kind: index type; with `gpu` the index is on GPU 0, in fp32 as on a CPU: candidates must not depend on the
            machine.

    Returns:
        The faiss index.

    Raises:
        UserError: faiss does not support this index on a GPU.
    """
    import faiss

    index: Any = (
        faiss.IndexFlatIP(dim) if kind.exact else faiss.index_factory(dim, kind.factory, faiss.METRIC_INNER_PRODUCT)
    )
    if kind.gpu:
        try:
            index = faiss.index_cpu_to_gpu(_gpu_resources(), 0, index)
        except RuntimeError as error:
            raise UserError(
                f"--index_factory {kind.factory}: faiss does not support it on a GPU ({_reason(error)}); choose "
                "another index or search on the CPU"
            ) from None
    return index


def check_gpu_search(gpus: int = 1) -> None:
    """Check that `--use_gpu_for_searching` can be honored.

    Args:
        gpus: GPUs of the cluster; the default assumes one, for the check before the cluster is known.

    Raises:
        UserError: the installed faiss has no GPU support, or there is no GPU.
    """
    import faiss

    if not hasattr(faiss, "GpuIndexFlatIP"):
        raise UserError(
            "--use_gpu_for_searching: the installed faiss is faiss-cpu; install raybge's extra `gpu` instead "
            "of `cpu`, or omit the flag"
        )
    if not gpus:
        raise UserError("--use_gpu_for_searching: no GPU was found; omit the flag to search on the CPU")


def check_factory(factory: str, dim: int | None) -> None:
    """Check a faiss factory string, as far as is possible without data.

    Args:
        factory: the string.
        dim: width of the vectors; None if unknown: then only the syntax is checked.

    Raises:
        UserError: faiss cannot build the index.
    """
    try:
        empty_index(dim or 64, IndexKind(factory))
    except RuntimeError as error:
        if dim or "parse" in str(error):
            raise UserError(
                f"--index_factory {factory}: faiss cannot build this index ({_reason(error)}); examples: Flat, "
                "IVF1024,Flat, HNSW32"
            ) from None


def _reason(error: RuntimeError) -> str:
    """Return faiss's message without the source location and the C++ expression that failed."""
    return re.sub(r"^Error in .* at \S+:\d+: (Error: '.*' failed: )?", "", str(error).strip())
