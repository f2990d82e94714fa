"""Where a search runs, its default batch and its memory: on a cluster with GPUs, which are stubbed."""

import faiss
import pytest

from raybge.cli.options import MineOptions
from raybge.cli.parser import build_options
from raybge.cluster.resources import Cluster, Plan
from raybge.search import spec as spec_module
from raybge.search.faiss_index import IndexKind, empty_index
from raybge.search.memory import SearchMemory
from raybge.search.search_gpu import SearchGpu
from raybge.search.spec import IndexSpec
from raybge.util.errors import UserError

GIB = 1 << 30
GPUS = Cluster(False, 64, 8, 1, (64,), (8,), 100 * GIB)
CPUS = Cluster(False, 64, 0, 1, (64,), (0,), 100 * GIB)
GPU_ACTORS, CPU_ACTORS = Plan(8, 5, 1), Plan(63, 1, 0)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(faiss, free): what a GPU of the cluster has; without a call, asking for it is an error."""
    monkeypatch.setattr(spec_module, "check_gpu_search", lambda gpus=1: None)
    monkeypatch.setattr(spec_module, "probe_gpu", lambda: pytest.fail("the GPU was probed"))

    def provide(has_faiss: bool, free: int = 10 * GIB) -> None:
        monkeypatch.setattr(spec_module, "probe_gpu", lambda: SearchGpu(has_faiss, free))

    return provide


def index(**flags) -> IndexSpec:
    files = {"model_name_or_path": "m", "input_file": "i", "output_file": "o"}
    return IndexSpec.from_options(build_options(MineOptions, {**files, **flags}))


def test_a_cluster_with_gpus_and_faiss_for_them_searches_there(gpu):
    gpu(True)
    found = index().on_cluster(GPUS, GPU_ACTORS, 210, "k")
    assert found.gpu is True and found.kind == IndexKind("Flat", True) and found.batch == 1024
    assert found.describe_place() == "search: on GPUs in fp32, 1,024 queries at a time"


def test_faiss_without_gpus_searches_on_cpus(gpu):
    gpu(False)
    found = index().on_cluster(GPUS, GPU_ACTORS, 210, "k")
    assert found.gpu is False and found.batch == 64 and found.describe_place() is None


@pytest.mark.parametrize(
    ("flags", "cluster", "plan", "k"),
    [
        ({}, CPUS, CPU_ACTORS, 210),
        ({}, GPUS, CPU_ACTORS, 210),  # --use_gpu False
        ({"use_gpu_for_searching": False}, GPUS, GPU_ACTORS, 210),
        ({"index_factory": "IVF8,Flat"}, GPUS, GPU_ACTORS, 210),  # its cells are trained: others than on a CPU
        ({}, GPUS, GPU_ACTORS, 2049),  # more candidates than faiss returns
    ],
    ids=["no GPU", "actors without GPU", "told otherwise", "approximate", "many candidates"],
)
def test_other_searches_run_on_cpus_and_ask_no_gpu(gpu, flags, cluster, plan, k):
    found = index(**flags).on_cluster(cluster, plan, k, "k")
    assert found.gpu is False and not found.kind.gpu and found.batch == 64


@pytest.mark.parametrize(
    ("plan", "k", "has_faiss", "message"),
    [
        (CPU_ACTORS, 210, True, "--use_gpu_for_searching requires actors with GPUs: omit --use_gpu False"),
        (GPU_ACTORS, 2049, True, "--range_for_sampling requests 2,049 candidates"),
        (GPU_ACTORS, 210, False, "faiss on the cluster's GPU nodes is faiss-cpu; install"),
    ],
    ids=["actors without GPU", "many candidates", "faiss-cpu"],
)
def test_a_request_that_cannot_be_honored_is_an_error(gpu, plan, k, has_faiss, message):
    gpu(has_faiss)
    with pytest.raises(UserError, match=message):
        index(use_gpu_for_searching=True).on_cluster(GPUS, plan, k, "range_for_sampling")


def test_the_batch_of_the_flag_is_kept(gpu):
    gpu(True)
    assert index(search_batch_size=7).on_cluster(GPUS, GPU_ACTORS, 210, "k").batch == 7


def test_memory_plan_takes_the_free_memory_of_the_gpu(gpu):
    """Shards of 1 GiB in fp32, in 80% of what is free, or half of it next to a cross-encoder."""
    gpu(True, 10 * GIB)
    found = index(shard_size=GIB // 4096).on_cluster(GPUS, GPU_ACTORS, 210, "k")

    def resident(with_model: bool) -> int:
        return SearchMemory.plan(found, GPUS, GPU_ACTORS, 1 << 30, 1024, with_model).resident_shards

    assert resident(False) == 8 and resident(True) == 5
    gpu(True, GIB)
    full = index(shard_size=GIB // 4096).on_cluster(GPUS, GPU_ACTORS, 210, "k")
    with pytest.raises(UserError, match="has 0.9 GB; use smaller shards, or --use_gpu_for_searching False"):
        SearchMemory.plan(full, GPUS, GPU_ACTORS, 1 << 30, 1024)


def test_an_index_on_a_gpu_keeps_fp32(monkeypatch):
    """A half-precision copy would give other candidates than a CPU."""
    copies = []
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda *arguments: copies.append(arguments), raising=False)
    empty_index(8, IndexKind("Flat", True))
    ((_, device, cpu_index, *options),) = copies
    assert device == 0 and cpu_index.d == 8 and not options
