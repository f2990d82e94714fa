"""Negatives from other groups, and from other workers, with the gradient of one process that holds the whole batch.

Each worker compares only its own B queries with the passages of all W workers. The passages are gathered with a
differentiable all-gather, whose backward pass sums what every worker's queries say about them (a reduce-scatter).
Data-parallel training then averages parameter gradients over workers, so each worker's share of the mean over all Q
queries is multiplied by W. The result is the gradient of the mean over Q, whatever W is.

Letters in tensor names: B own queries, M own passages, N passages of all workers, Q queries of all workers, D width,
G passages of a group, R known positives, W workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from raybge.data.step_batch import Groups
from raybge.losses.functional import info_nce, kl_divergence, m3_distillation, scores
from raybge.losses.masks import FalseNegativeMargin, ScoreMask, equal_keys
from raybge.util.activity import collective


@dataclass(frozen=True)
class Objective:
    """What is minimised, and which passages count as a query's negatives.

    Args:
        temperature: scores are divided by it.
        in_batch: other groups' passages count at all.
        cross_device: those of the whole global batch count, else those of the query's block alone.
        block: groups of one block of the global batch; blocks do not depend on which workers hold them.
        bidirectional: InfoNCE is the mean of finding the positive among all passages and finding its query among all
            queries, as in CLIP, https://arxiv.org/abs/2103.00020.
        distillation: "kl_div", added to InfoNCE, or "m3_kd_loss", in its place.
        mrl_dims: the loss is the mean over these prefixes of the vectors, https://arxiv.org/abs/2205.13147.
        normalized: vectors have length 1, and their prefixes get it.
        mask_known: a passage whose text is one of the query's known positives is no negative.
        margin: nor is one whose cosine is above the positive's less this, https://arxiv.org/abs/2402.16829.
        score_block: passages scored at a time; None scores all at once.
    """

    temperature: float
    in_batch: bool = True
    cross_device: bool = True
    block: int = 0
    bidirectional: bool = False
    distillation: str | None = None
    mrl_dims: tuple[int, ...] = ()
    normalized: bool = True
    mask_known: bool = True
    margin: float | None = None
    score_block: int | None = None

    def loss(self, q_BD: Tensor, p_MD: Tensor, groups: Groups, guide: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """This worker's share of the loss; its mean over workers is the mean over all queries of the step.

        Args:
            q_BD, p_MD: own embeddings.
            guide: those of a guide model, from which the margin's cosines come instead. No gradient.

        Returns:
            A scalar with the gradient described above. It may be called with B = 0, as long as all workers call it.
        """
        step = _Step.gather(groups)
        p_ND = gather_rows(p_MD, step.passages_W)
        q_QD = gather_rows(q_BD, step.queries_W) if self.bidirectional else None
        seen = self._seen_passages(step, groups, q_BD, p_ND, guide)
        back = None if q_QD is None else self._seen_queries(step, groups, p_MD, q_QD, guide)
        picks_BG, teacher_BG = self._picks(step, groups)

        total_B = q_BD.new_zeros(len(q_BD), dtype=torch.float32)
        for dim in self.mrl_dims or (q_BD.shape[1],):
            q, p = self._prefix(q_BD, dim), self._prefix(p_ND, dim)
            found_B, at_BG = scores(q, p, picks_BG, seen, self.temperature, self.score_block)
            loss_B = m3_distillation(found_B, at_BG, teacher_BG) if self.distillation == "m3_kd_loss" else found_B
            if q_QD is not None:
                positive, queries = self._prefix(p_MD[step.first_B], dim), self._prefix(q_QD, dim)
                back_B = info_nce(positive, queries, step.query_B, back, self.temperature, self.score_block)
                loss_B = (loss_B + back_B) / 2
            if self.distillation == "kl_div":
                loss_B = loss_B + kl_divergence(at_BG, teacher_BG)
            total_B = total_B + loss_B
        return total_B.sum() * len(step.queries_W) / sum(step.queries_W) / max(1, len(self.mrl_dims))

    def _prefix(self, x_RD: Tensor, dim: int) -> Tensor:
        if dim == x_RD.shape[1]:
            return x_RD
        return normalize(x_RD[:, :dim], dim=-1) if self.normalized else x_RD[:, :dim]

    def _picks(self, step: _Step, groups: Groups) -> tuple[Tensor, Tensor]:
        """Places of the passages whose scores the loss needs, positive first, and what the teacher says of them."""
        if self.distillation is None:
            return step.targets_B[:, None], torch.empty(0)
        assert groups.teacher_score_M is not None
        size = int(groups.passages_B.max()) if len(groups.passages_B) else 1
        rank_G = torch.arange(size, device=groups.passages_B.device)
        there_BG = rank_G < groups.passages_B[:, None]
        teacher_BG = groups.teacher_score_M.new_full(there_BG.shape, -torch.inf)
        teacher_BG[there_BG] = groups.teacher_score_M
        return torch.where(there_BG, step.targets_B[:, None] + rank_G, -1), teacher_BG

    @property
    def _reach(self) -> int | None:
        if not self.in_batch:
            return 1
        return None if self.cross_device else self.block

    def _seen_passages(
        self, step: _Step, groups: Groups, q_BD: Tensor, p_ND: Tensor, guide: tuple[Tensor, Tensor] | None
    ) -> ScoreMask:
        group_N = torch.repeat_interleave(step.passages_Q)
        hidden_K = None
        if self.mask_known and groups.passage_key_M is not None:
            assert groups.known_B is not None and groups.known_key_R is not None
            key_N = gather_rows(groups.passage_key_M, step.passages_W)
            row_R = torch.repeat_interleave(groups.known_B)
            column_N = torch.arange(len(key_N), device=key_N.device)
            hidden_K = _beside(step.targets_B, *equal_keys(row_R, groups.known_key_R, column_N, key_N))
        margin = None
        if self.margin is not None:
            row_BD, column_ND = (q_BD, p_ND) if guide is None else (guide[0], gather_rows(guide[1], step.passages_W))
            margin = FalseNegativeMargin.below(row_BD, column_ND, step.targets_B, self.margin)
        others_only = self.distillation == "m3_kd_loss"  # which counts the own group by itself
        alone_B = groups.alone_B
        return ScoreMask(step.targets_B, step.query_B, group_N, self._reach, alone_B, hidden_K, margin, others_only)

    def _seen_queries(
        self, step: _Step, groups: Groups, p_MD: Tensor, q_QD: Tensor, guide: tuple[Tensor, Tensor] | None
    ) -> ScoreMask:
        group_Q = torch.arange(len(q_QD), device=q_QD.device)
        hidden_K = None
        if self.mask_known and groups.passage_key_M is not None:
            assert groups.known_B is not None and groups.known_key_R is not None
            known_Q = gather_rows(groups.known_B, step.queries_W)
            known_key = gather_rows(groups.known_key_R, step.known_W)
            row_B = torch.arange(len(step.first_B), device=q_QD.device)
            column_R = torch.repeat_interleave(known_Q)
            hidden_K = _beside(
                step.query_B, *equal_keys(row_B, groups.passage_key_M[step.first_B], column_R, known_key)
            )
        margin = None
        if self.margin is not None:
            row_MD, column_QD = (p_MD, q_QD) if guide is None else (guide[1], gather_rows(guide[0], step.queries_W))
            margin = FalseNegativeMargin.below(row_MD[step.first_B], column_QD, step.query_B, self.margin)
        return ScoreMask(step.query_B, step.query_B, group_Q, self._reach, groups.alone_B, hidden_K, margin)


@dataclass(frozen=True)
class _Step:
    """Where a worker's groups lie in the whole step.

    `queries_W`, `passages_W`, `known_W`: what each worker holds. `passages_Q`: passages of every group. `query_B`: own
    queries among all; `targets_B`: own positives among all passages; `first_B`: among the own ones.
    """

    queries_W: list[int]
    passages_W: list[int]
    known_W: list[int]
    passages_Q: Tensor
    query_B: Tensor
    targets_B: Tensor
    first_B: Tensor

    @classmethod
    def gather(cls, groups: Groups) -> _Step:
        passages_B = groups.passages_B
        known = 0 if groups.known_key_R is None else len(groups.known_key_R)
        mine = [len(passages_B), int(passages_B.sum()), known]
        queries_W, passages_W, known_W = gather_counts(mine, passages_B.device)
        _, rank = _world()
        first_B = passages_B.cumsum(0) - passages_B
        return cls(
            queries_W,
            passages_W,
            known_W,
            passages_Q=gather_rows(passages_B, queries_W),
            query_B=torch.arange(len(passages_B), device=passages_B.device) + sum(queries_W[:rank]),
            targets_B=first_B + sum(passages_W[:rank]),
            first_B=first_B,
        )


def _beside(targets_B: Tensor, row_K: Tensor, column_K: Tensor) -> tuple[Tensor, Tensor] | None:
    """The places that are not a row's target; None where there are none, so that most steps need no mask."""
    other_K = targets_B[row_K] != column_K
    return (row_K[other_K], column_K[other_K]) if bool(other_K.any()) else None


def gather_counts(counts: Sequence[int], device: torch.device) -> list[list[int]]:
    """For each of the numbers that a worker passes: that number of every worker, in the order of their ranks."""
    world, _ = _world()
    if world == 1:
        return [[count] for count in counts]
    counts_Wc = torch.zeros(world * len(counts), dtype=torch.int64, device=device)
    with collective("gathering"):
        dist.all_gather_single(counts_Wc, torch.tensor(counts, dtype=torch.int64, device=device))
        return counts_Wc.view(world, len(counts)).T.tolist()


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
    """Number of workers and own rank."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
