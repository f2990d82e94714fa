"""Specs that the commands with a search share: how the pool is indexed and searched, and which output is written."""

from __future__ import annotations

from dataclasses import dataclass

from raybge.cli.checks import check_at_least
from raybge.cli.options import EncodeOptions, EvaluateOptions, MineOptions
from raybge.cluster.resources import Cluster
from raybge.search.faiss_index import FLAT, GPU_MAX_CANDIDATES, IndexKind, check_factory, check_gpu_search
from raybge.util.errors import UserError


@dataclass(frozen=True)
class IndexSpec:
    """Sharded faiss index over the passages and how queries are searched in it.

    Args:
        factory: faiss index factory string of each shard; "Flat" is exact.
        gpu: search on the GPU.
        shard_size: passages per shard.
        shards_per_actor: shards that a search actor holds in memory at a time; None: as many as its memory holds.
        search_batch_size: queries searched at a time.
    """

    factory: str = FLAT
    gpu: bool = False
    shard_size: int = 250_000
    shards_per_actor: int | None = None
    search_batch_size: int = 64

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
        return IndexKind(self.factory, self.gpu)

    def check_factory(self, dim: int | None) -> None:
        """Check the factory string, as far as is possible without data.

        Args:
            dim: width of the vectors; None if unknown.

        Raises:
            UserError: faiss cannot build the index.
        """
        check_factory(self.factory, dim)

    def check_candidates(self, cluster: Cluster, k: int, flag: str) -> None:
        """Check that the GPU, if requested, can run the search.

        Args:
            cluster: the connected cluster.
            k: candidates per query.
            flag: name of the flag that determines `k`, without dashes.

        Raises:
            UserError: there is no GPU, or faiss returns fewer candidates on a GPU.
        """
        if not self.gpu:
            return
        check_gpu_search(cluster.gpus)
        if k > GPU_MAX_CANDIDATES:
            raise UserError(
                f"--{flag} requests {k:,} candidates per query: with --use_gpu_for_searching at most "
                f"{GPU_MAX_CANDIDATES:,} are possible; lower it or search on the CPU"
            )


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
