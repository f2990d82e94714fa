"""Properties of the GPUs that search actors get: free memory, and GPU support of the faiss installed there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SearchGpu:
    """One GPU of the cluster, as a search actor sees it.

    Args:
        has_faiss: faiss is installed there with GPU support.
        free_memory: bytes that no process uses.
    """

    has_faiss: bool
    free_memory: int


def probe_gpu() -> SearchGpu:
    """Return the properties of a GPU, read in a Ray task that gets one."""
    import ray

    def probe() -> SearchGpu:
        import faiss
        import torch

        return SearchGpu(hasattr(faiss, "GpuIndexFlatIP"), int(torch.cuda.mem_get_info()[0]))

    gpu: SearchGpu = ray.get(ray.remote(probe).options(num_gpus=1).remote())
    return gpu
