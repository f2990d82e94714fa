"""Specs that the commands with a search share: how the pool is indexed and searched, and which output is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

from raybge.cli.checks import check_at_least
from raybge.cli.options import EncodeOptions, EvaluateOptions, MineOptions
from raybge.cluster.resources import Cluster, Plan
from raybge.search.faiss_index import FLAT, GPU_MAX_CANDIDATES, IndexKind, check_factory, check_gpu_search
from raybge.search.search_gpu import probe_gpu
from raybge.util.errors import UserError

CPU_SEARCH_BATCH, GPU_SEARCH_BATCH = 64, 1024  # queries of a batch by default: a GPU is not busy with 64


@dataclass(frozen=True)
class IndexSpec:
    """Sharded faiss index over the passages and how queries are searched in it.

    Args:
        factory: faiss index factory string of each shard; "Flat" is exact.
        gpu: search on the GPU; None: not decided yet, see `on_cluster`.
        shard_size: passages per shard.
        shards_per_actor: shards that a search actor holds in memory at a time; None: as many as its memory holds.
        search_batch_size: queries searched at a time; None: the default of a CPU or of a GPU.
        gpu_memory: free bytes of a GPU, once it is decided that the search runs there.
    """

    factory: str = FLAT
    gpu: bool | None = None
    shard_size: int = 250_000
    shards_per_actor: int | None = None
    search_batch_size: int | None = None
    gpu_memory: int = 0

    @classmethod
    def from_options(cls, options: MineOptions | EvaluateOptions) -> IndexSpec:
        """Read the search flags.

        Args:
            options: the command's options.

        Returns:
            The spec.

        Raises:
            UserError: a size is below 1, or the installed faiss has no GPU search.
        """
        check_at_least(1, options, "search_batch_size", "shard_size", "shards_per_actor")
        if options.use_gpu_for_searching:
            check_gpu_search()
        return cls(
            options.index_factory,
            options.use_gpu_for_searching,
            options.shard_size,
            options.shards_per_actor,
            options.search_batch_size,
        )

    @property
    def kind(self) -> IndexKind:
        """Index kind of one shard."""
        return IndexKind(self.factory, bool(self.gpu))

    @property
    def batch(self) -> int:
        """Queries searched at a time."""
        return self.search_batch_size or (GPU_SEARCH_BATCH if self.gpu else CPU_SEARCH_BATCH)

    def check_factory(self, dim: int | None) -> None:
        """Check the factory string, as far as is possible without data.

        Args:
            dim: width of the vectors; None if unknown.

        Raises:
            UserError: faiss cannot build the index.
        """
        check_factory(self.factory, dim)

    def on_cluster(self, cluster: Cluster, plan: Plan, k: int, flag: str) -> IndexSpec:
        """Decide whether the search runs on GPUs, and check that it can.

        Without the flag it does if the actors have GPUs, faiss supports them there, and the result is that of a CPU:
        with the exact index alone, since others are trained and differ.

        Args:
            cluster: the connected cluster.
            plan: actors and their resources.
            k: candidates per query.
            flag: name of the flag that determines `k`, without dashes.

        Returns:
            The spec with `gpu` decided.

        Raises:
            UserError: the GPU was requested, and there is none, or faiss does not support it or so many candidates.
        """
        if self.gpu:
            self._check_gpu(cluster, plan, k, flag)
        elif self.gpu is False or not plan.gpus or not self.kind.exact or k > GPU_MAX_CANDIDATES:
            return replace(self, gpu=False)
        gpu = probe_gpu()
        if self.gpu and not gpu.has_faiss:
            raise UserError(
                "--use_gpu_for_searching: faiss on the cluster's GPU nodes is faiss-cpu; install raybge's extra `gpu` "
                "there instead of `cpu`, or omit the flag"
            )
        return replace(self, gpu=gpu.has_faiss, gpu_memory=gpu.free_memory)

    def _check_gpu(self, cluster: Cluster, plan: Plan, k: int, flag: str) -> None:
        check_gpu_search(cluster.gpus)
        if not plan.gpus:
            raise UserError("--use_gpu_for_searching requires actors with GPUs: omit --use_gpu False")
        if k > GPU_MAX_CANDIDATES:
            raise UserError(
                f"--{flag} requests {k:,} candidates per query: with --use_gpu_for_searching at most "
                f"{GPU_MAX_CANDIDATES:,} are possible; lower it or search on the CPU"
            )

    def describe_place(self) -> str | None:
        """Return the plan line on a search that runs on GPUs; None for one on CPUs."""
        if not self.gpu:
            return None
        return f"search: on GPUs in fp32, {self.batch:,} queries at a time"


@dataclass(frozen=True)
class OutputSpec:
    """Output of a command that writes one file (or folder) and keeps its work in a store until it is finished.

    Args:
        path: output file, folder or URI.
        overwrite: replace a finished output.
        dry_run: print the plan and stop.
        storage_path: folder or URI whose work outlives the run; None: next to the output, removed at the end.
    """

    path: str
    overwrite: bool = False
    dry_run: bool = False
    storage_path: str | None = None

    @classmethod
    def from_options(cls, options: MineOptions | EncodeOptions) -> OutputSpec:
        """Read the output flags."""
        return cls(options.output_file, options.overwrite, options.dry_run, options.storage_path)
