"""Negatives from other groups, and from other workers, with the gradient of one process that holds the whole batch.

Each worker compares only its own B queries with the passages of all W workers. The passages are gathered with a
differentiable all-gather, whose backward pass sums what every worker's queries say about them (a reduce-scatter).
Data-parallel training then averages parameter gradients over workers, so each worker's share of the mean over all Q
queries is multiplied by W. The result is the gradient of the mean over Q, whatever W is.

Letters in tensor names: B own queries, M own passages, N passages of all workers, Q queries of all workers, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raybge.model.losses import info_nce


@dataclass(frozen=True)
class Objective:
    """Which passages count as a query's negatives.

    Args:
        temperature: scores are divided by it.
        in_batch: other groups' passages count at all.
        cross_device: those of the whole global batch count, else those of the query's block alone.
        block: groups of one block of the global batch; blocks do not depend on which workers hold them.
    """

    temperature: float
    in_batch: bool = True
    cross_device: bool = True
    block: int = 0

    def loss(self, q_BD: Tensor, p_MD: Tensor, passages_B: Tensor) -> Tensor:
        """This worker's share of the loss; its mean over workers is the mean over all queries of the step.

        Args:
            q_BD, p_MD: own embeddings; p_MD holds the groups one after the other, each positive first.
            passages_B: int64, passages of each group.

        Returns:
            A scalar with the gradient described above. It may be called with B = 0, as long as all workers call it.
        """
        world, rank = _world()
        counts_W = gather_counts(len(q_BD), q_BD.device)
        first = sum(counts_W[:rank])
        passages_Q = gather_rows(passages_B, counts_W)
        own_W = [int(part.sum()) for part in passages_Q.split(counts_W)]
        p_ND = gather_rows(p_MD, own_W)

        query_B = torch.arange(first, first + len(q_BD), device=q_BD.device)
        targets_B = (passages_Q.cumsum(0) - passages_Q)[query_B]
        group_N = torch.repeat_interleave(torch.arange(len(passages_Q), device=q_BD.device), passages_Q)
        loss_B = info_nce(q_BD, p_ND, targets_B, self._mask(query_B, group_N), self.temperature)
        return loss_B.sum() * world / len(passages_Q)

    def _mask(self, query_B: Tensor, group_N: Tensor) -> Tensor | None:
        if not self.in_batch:
            return query_B[:, None] == group_N[None, :]
        if not self.cross_device:
            return (query_B // self.block)[:, None] == (group_N // self.block)[None, :]
        return None


def gather_counts(count: int, device: torch.device) -> list[int]:
    """The number that every worker passes, in the order of their ranks."""
    world, _ = _world()
    if world == 1:
        return [count]
    counts_W = torch.zeros(world, dtype=torch.int64, device=device)
    dist.all_gather_single(counts_W, torch.tensor([count], dtype=torch.int64, device=device))
    return counts_W.tolist()


def gather_rows(x_r: Tensor, counts_W: Sequence[int]) -> Tensor:
    """The rows of all workers, those of worker 0 first. Differentiable; workers may hold different numbers of rows."""
    if len(counts_W) == 1:
        return x_r
    return _GatherRows.apply(x_r, list(counts_W))


class _GatherRows(torch.autograd.Function):
    """All-gather of uneven shares; backward sums over workers the gradient of each worker's rows.

    Backends want equal shares, so shares are padded to the longest and trimmed afterwards.
    """

    @staticmethod
    def forward(ctx: Any, x_r: Tensor, counts_W: list[int]) -> Tensor:
        ctx.counts_W = counts_W
        longest = max(counts_W)
        padded = x_r.new_zeros((longest, *x_r.shape[1:]))
        padded[: len(x_r)] = x_r
        out = x_r.new_empty((len(counts_W) * longest, *x_r.shape[1:]))
        dist.all_gather_single(out, padded)
        return torch.cat([part[:n] for part, n in zip(out.split(longest), counts_W, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_N,) = grads
        longest = max(ctx.counts_W)
        parts = grad_N.split(ctx.counts_W)
        padded = torch.cat([torch.cat([g, g.new_zeros((longest - len(g), *g.shape[1:]))]) for g in parts])
        own = grad_N.new_empty((longest, *grad_N.shape[1:]))
        dist.reduce_scatter_single(own, padded)
        return own[: ctx.counts_W[dist.get_rank()]], None


def _world() -> tuple[int, int]:
    """Number of workers and own rank."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
