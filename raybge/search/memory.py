"""Memory plan of the search actors: shards in memory at a time, and the plan line about it."""

from __future__ import annotations

from dataclasses import dataclass

from raybge.cluster.resources import Cluster, Plan
from raybge.search.actor_pool import blocks_in_progress
from raybge.search.key_table import KEY_BYTES
from raybge.search.search_data import SearchData
from raybge.search.shards import TIE_MARGIN
from raybge.search.spec import IndexSpec
from raybge.util.errors import UserError
from raybge.util.plural import plural

MEMORY_SHARE = 0.8  # share of the memory that Ray counts for an actor, or of a GPU's free memory, used for vectors
MEMORY_SHARE_WITH_MODEL = 0.5  # the same where the actor has a cross-encoder on the GPU too


@dataclass(frozen=True)
class SearchMemory:
    """Distribution of the shards over search actors.

    Args:
        passages: passages in the pool.
        shard_size: passages of a shard, at most the pool.
        resident_shards: shards that an actor holds in memory at a time.
        actors: search actors.
        dim: width of the vectors.
        encoded_blocks: blocks that an encoding actor holds at a time.
    """

    passages: int
    shard_size: int
    resident_shards: int
    actors: int
    dim: int
    encoded_blocks: int = 1

    @classmethod
    def plan(
        cls, index: IndexSpec, cluster: Cluster, plan: Plan, passages: int, dim: int, with_model: bool = False
    ) -> SearchMemory:
        """Choose the number of resident shards: `shards_per_actor`, or as many as the memory holds.

        Args:
            index: the index.
            cluster: the cluster, for its memory.
            plan: workers and their resources.
            passages: passages in the pool.
            dim: width of the vectors.
            with_model: a cross-encoder runs on the search actors.

        Returns:
            The memory plan.

        Raises:
            UserError: one shard does not fit into an actor's memory.
        """
        size = min(index.shard_size, passages)
        resident = index.shards_per_actor
        if not resident:
            shard_bytes = size * dim * 4
            share = MEMORY_SHARE_WITH_MODEL if index.gpu and with_model else MEMORY_SHARE
            available = (index.gpu_memory if index.gpu else cluster.memory / plan.workers) * share
            if shard_bytes > available > 0:
                elsewhere = ", or --use_gpu_for_searching False" if index.gpu else ""
                raise UserError(
                    f"--shard_size {size:,}: a shard of vectors of {dim} numbers needs {shard_bytes / 1e9:.1f} GB, but "
                    f"a search actor has {available / 1e9:.1f} GB; use smaller shards{elsewhere}"
                )
            resident = max(1, int(available // shard_bytes))
        return cls(passages, size, resident, plan.workers, dim, blocks_in_progress(plan))

    def describe(self, data: SearchData, k: int) -> str:
        """Return the plan line on the memory of a process besides its libraries and the model.

        Args:
            data: pool and queries.
            k: candidates per query.

        Returns:
            The line.
        """
        shards = -(-self.passages // self.shard_size)
        actors = min(self.actors, shards)
        own, resident = -(-shards // actors), self.resident_shards
        vector_bytes = min(resident, own) * self.shard_size * self.dim * 4
        key_bytes = own * self.shard_size * KEY_BYTES
        list_bytes = (
            2 * 40 * int(data.queries.survey.rows.max()) * (k + TIE_MARGIN)
        )  # two lists to merge, and their order
        passes = -(-own // resident)
        encoded = "one block" if self.encoded_blocks == 1 else f"{self.encoded_blocks} blocks"
        return (
            f"memory: a search actor holds {min(resident, own):,} of its {plural(own, 'shard')} at a time: "
            f"{vector_bytes / 1e6:,.0f} MB of vectors, {key_bytes / 1e6:,.0f} MB of keys, {list_bytes / 1e6:,.1f} MB "
            f"of candidate lists; {plural(passes, 'pass')} over the queries; an encoding actor holds "
            f"{encoded} of at most {plural(int(data.unique.unique_B.max()), 'passage')}"
        )
