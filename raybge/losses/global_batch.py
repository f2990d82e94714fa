"""The global batch: sizes of all workers' shares, positions of the own groups in it, and gathers of uneven shares.

Letters in tensor names: B own queries, M own passages, N passages of all workers, Q queries of all workers, R known
positives, W workers, r own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raybge.data.step_batch import Groups
from raybge.util.activity import collective


@dataclass(frozen=True)
class GlobalBatch:
    """Sizes of the global batch, and the positions of this worker's groups in it.

    Args:
        queries_W: queries of each worker.
        passages_W: passages of each worker.
        known_W: known positives of each worker's queries.
        passages_Q: passages of each group.
        query_B: indices in Q of the own queries.
        target_B: indices in N of the own positives.
        own_target_B: indices in M of the own positives.
    """

    queries_W: list[int]
    passages_W: list[int]
    known_W: list[int]
    passages_Q: Tensor
    query_B: Tensor
    target_B: Tensor
    own_target_B: Tensor

    @classmethod
    def gather(cls, groups: Groups[Tensor]) -> GlobalBatch:
        """Exchange the sizes with all workers. Collective."""
        passages_B = groups.passages_B
        known = 0 if groups.known_key_R is None else len(groups.known_key_R)
        own_counts = [len(passages_B), int(passages_B.sum()), known]
        queries_W, passages_W, known_W = gather_counts(own_counts, passages_B.device)
        _, rank = _world()
        own_target_B = passages_B.cumsum(0) - passages_B
        return cls(
            queries_W,
            passages_W,
            known_W,
            passages_Q=gather_rows(passages_B, queries_W),
            query_B=torch.arange(len(passages_B), device=passages_B.device) + sum(queries_W[:rank]),
            target_B=own_target_B + sum(passages_W[:rank]),
            own_target_B=own_target_B,
        )


def gather_counts(counts: Sequence[int], device: torch.device) -> list[list[int]]:
    """Gather several numbers of each worker in one collective.

    Args:
        counts: this worker's numbers, equally many on each worker.
        device: the process group's device.

    Returns:
        For each number a list of W values in the order of ranks.
    """
    world, _ = _world()
    if world == 1:
        return [[count] for count in counts]
    counts_Wc = torch.zeros(world * len(counts), dtype=torch.int64, device=device)
    with collective("gathering"):
        dist.all_gather_single(counts_Wc, torch.tensor(counts, dtype=torch.int64, device=device))
        gathered: list[list[int]] = counts_Wc.view(world, len(counts)).T.tolist()
    return gathered


def gather_rows(x_r: Tensor, counts_W: Sequence[int]) -> Tensor:
    """Gather the rows of all workers in the order of ranks; differentiable.

    Args:
        x_r: this worker's rows, (counts_W[rank], ...).
        counts_W: rows of each worker, which may differ.

    Returns:
        (sum(counts_W), ...).
    """
    if len(counts_W) == 1:
        return x_r
    return _GatherRows.apply(x_r, list(counts_W))


class _GatherRows(torch.autograd.Function):
    """All-gather of uneven shares; backward sums over workers the gradient of each worker's rows.

    Backends require equal shares, so shares are padded to the longest and trimmed afterwards.
    """

    @staticmethod
    def forward(ctx: Any, x_r: Tensor, counts_W: list[int]) -> Tensor:
        ctx.counts_W = counts_W
        longest = max(counts_W)
        padded = x_r.new_zeros((longest, *x_r.shape[1:]))
        padded[: len(x_r)] = x_r
        out = x_r.new_empty((len(counts_W) * longest, *x_r.shape[1:]))
        with collective("gathering"):
            dist.all_gather_single(out, padded)
        return torch.cat([part[:n] for part, n in zip(out.split(longest), counts_W, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_N,) = grads
        longest = max(ctx.counts_W)
        parts = grad_N.split(ctx.counts_W)
        padded = torch.cat([torch.cat([g, g.new_zeros((longest - len(g), *g.shape[1:]))]) for g in parts])
        own = grad_N.new_empty((longest, *grad_N.shape[1:]))
        with collective("gathering gradients"):
            dist.reduce_scatter_single(own, padded)
        return own[: ctx.counts_W[dist.get_rank()]], None


def _world() -> tuple[int, int]:
    """Return the number of workers and the own rank."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
