"""Contrastive objective over all workers, with the gradient of one process that holds the whole batch.

The steps of `Objective.loss`:

1. `_GlobalBatch.gather`: exchange the sizes and find the own groups' positions in the global batch.
2. `gather_rows`: all-gather the passages, so that each worker compares its own B queries with the passages of all W
   workers. The gather is differentiable: its backward pass sums, with a reduce-scatter, the gradients that every
   worker's queries have with respect to a passage.
3. `_passage_mask`: which passages count as a query's negatives (`masks.py`).
4. `softmax_terms` and the losses on it (`functional.py`): one value per own query, for each Matryoshka dimension.
5. The sum, scaled by W / Q. Data-parallel training averages parameter gradients over workers, so the result is the
   gradient of the mean over all Q queries, whatever W is.

Memory is bounded in two places: `EmbeddingModel.embed` recomputes sub-batches in its backward pass (GradCache,
https://arxiv.org/abs/2101.06983), and `score_block` scores that many passages at a time.

Letters in tensor names: B own queries, M own passages, N passages of all workers, Q queries of all workers, D width of
a vector, G passages of a group, R known positives, K (row, column) pairs, W workers.
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
from raybge.losses.functional import info_nce, kl_divergence, m3_distillation, softmax_terms
from raybge.losses.masks import FalseNegativeMargin, ScoreMask, equal_keys
from raybge.util.activity import collective


@dataclass(frozen=True)
class Objective:
    """Training objective: the loss, and which passages count as a query's negatives.

    Args:
        temperature: scores are divided by it.
        in_batch: passages of other groups are negatives.
        cross_device: negatives come from the whole global batch, otherwise from the query's block.
        block: groups per block of the global batch; a block does not depend on which workers hold its groups.
        bidirectional: mean of the InfoNCE loss from query to passage and that from positive to query, as in CLIP,
            https://arxiv.org/abs/2103.00020.
        distillation: "kl_div" is added to InfoNCE; "m3_kd_loss" (BGE-M3, https://arxiv.org/abs/2402.03216) replaces it.
        mrl_dims: Matryoshka dimensions, https://arxiv.org/abs/2205.13147: the loss is the mean over these prefixes of
            the vectors.
        normalized: vectors have length 1, and their prefixes are scaled to it.
        mask_known: a passage whose text is a known positive of the query is no negative.
        margin: a passage whose cosine is above the positive's cosine minus the margin is no negative (GISTEmbed,
            https://arxiv.org/abs/2402.16829).
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

    def loss(
        self, q_BD: Tensor, p_MD: Tensor, groups: Groups[Tensor], guide: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Compute this worker's share of the loss; its mean over workers is the mean over all queries of the step.

        Collective: all workers call it, a worker without groups with B = 0.

        Args:
            q_BD: embeddings of the own queries.
            p_MD: embeddings of the own passages.
            groups: how the own passages form groups.
            guide: embeddings (B, D'), (M, D') of a guide model, which give the margin's cosines; no gradient. None: the
                cosines are those of q_BD and p_MD.

        Returns:
            A scalar whose gradient is the one described at the top of this file.
        """
        batch = _GlobalBatch.gather(groups)
        p_ND = gather_rows(p_MD, batch.passages_W)
        q_QD = gather_rows(q_BD, batch.queries_W) if self.bidirectional else None
        mask = self._passage_mask(batch, groups, q_BD, p_ND, guide)
        reverse_mask = None if q_QD is None else self._query_mask(batch, groups, p_MD, q_QD, guide)
        pick_BG, teacher_BG = self._scored_passages(batch, groups)

        total_B = q_BD.new_zeros(len(q_BD), dtype=torch.float32)
        for dim in self.mrl_dims or (q_BD.shape[1],):
            q, p = self._prefix(q_BD, dim), self._prefix(p_ND, dim)
            denominator_B, score_BG = softmax_terms(q, p, pick_BG, mask, self.temperature, self.score_block)
            if self.distillation == "m3_kd_loss":
                loss_B = m3_distillation(denominator_B, score_BG, teacher_BG)
            else:
                loss_B = denominator_B  # which is InfoNCE
            if q_QD is not None:
                positive, queries = self._prefix(p_MD[batch.own_target_B], dim), self._prefix(q_QD, dim)
                reverse_B = info_nce(positive, queries, batch.query_B, reverse_mask, self.temperature, self.score_block)
                loss_B = (loss_B + reverse_B) / 2
            if self.distillation == "kl_div":
                loss_B = loss_B + kl_divergence(score_BG, teacher_BG)
            total_B = total_B + loss_B
        return total_B.sum() * len(batch.queries_W) / sum(batch.queries_W) / max(1, len(self.mrl_dims))

    def _prefix(self, x_RD: Tensor, dim: int) -> Tensor:
        """Return the first `dim` numbers of each vector, at length 1 if the vectors have it."""
        if dim == x_RD.shape[1]:
            return x_RD
        return normalize(x_RD[:, :dim], dim=-1) if self.normalized else x_RD[:, :dim]

    def _scored_passages(self, batch: _GlobalBatch, groups: Groups[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the indices in N of the passages whose scores the loss needs, and their teacher scores.

        Args:
            batch: positions of the own groups.
            groups: sizes and teacher scores of the own groups.

        Returns:
            pick_BG, int64: the positive first, -1 where a group is shorter; G is 1 without distillation.
            teacher_BG: -inf where a group is shorter; empty without distillation.
        """
        if self.distillation is None:
            return batch.target_B[:, None], torch.empty(0)
        assert groups.teacher_score_M is not None
        size = int(groups.passages_B.max()) if len(groups.passages_B) else 1
        rank_G = torch.arange(size, device=groups.passages_B.device)
        exists_BG = rank_G < groups.passages_B[:, None]
        teacher_BG = groups.teacher_score_M.new_full(exists_BG.shape, -torch.inf)
        teacher_BG[exists_BG] = groups.teacher_score_M
        return torch.where(exists_BG, batch.target_B[:, None] + rank_G, -1), teacher_BG

    @property
    def _mask_block(self) -> int | None:
        """Groups whose passages a query is compared with: a block of this size, or None for all."""
        if not self.in_batch:
            return 1
        return None if self.cross_device else self.block

    def _passage_mask(
        self,
        batch: _GlobalBatch,
        groups: Groups[Tensor],
        q_BD: Tensor,
        p_ND: Tensor,
        guide: tuple[Tensor, Tensor] | None,
    ) -> ScoreMask:
        """Return the mask of own queries (B) and passages of all workers (N)."""
        group_N = torch.repeat_interleave(batch.passages_Q, output_size=len(p_ND))
        hidden_K = None
        if self.mask_known and groups.passage_key_M is not None:
            assert groups.known_B is not None and groups.known_key_R is not None
            key_N = gather_rows(groups.passage_key_M, batch.passages_W)
            row_R = torch.repeat_interleave(groups.known_B, output_size=len(groups.known_key_R))
            column_N = torch.arange(len(key_N), device=key_N.device)
            hidden_K = _without_targets(batch.target_B, *equal_keys(row_R, groups.known_key_R, column_N, key_N))
        margin = None
        if self.margin is not None:
            row_BD, column_ND = (q_BD, p_ND) if guide is None else (guide[0], gather_rows(guide[1], batch.passages_W))
            margin = FalseNegativeMargin.below_target(row_BD, column_ND, batch.target_B, self.margin)
        others_only = self.distillation == "m3_kd_loss"  # it adds the own group itself
        return ScoreMask(
            batch.target_B, batch.query_B, group_N, self._mask_block, groups.alone_B, hidden_K, margin, others_only
        )

    def _query_mask(
        self,
        batch: _GlobalBatch,
        groups: Groups[Tensor],
        p_MD: Tensor,
        q_QD: Tensor,
        guide: tuple[Tensor, Tensor] | None,
    ) -> ScoreMask:
        """Return the mask of own positives (B) and queries of all workers (Q), for the reverse direction."""
        group_Q = torch.arange(len(q_QD), device=q_QD.device)
        hidden_K = None
        if self.mask_known and groups.passage_key_M is not None:
            assert groups.known_B is not None and groups.known_key_R is not None
            known_Q = gather_rows(groups.known_B, batch.queries_W)
            known_key = gather_rows(groups.known_key_R, batch.known_W)
            row_B = torch.arange(len(batch.own_target_B), device=q_QD.device)
            column_R = torch.repeat_interleave(known_Q, output_size=len(known_key))
            key_B = groups.passage_key_M[batch.own_target_B]
            hidden_K = _without_targets(batch.query_B, *equal_keys(row_B, key_B, column_R, known_key))
        margin = None
        if self.margin is not None:
            row_MD, column_QD = (p_MD, q_QD) if guide is None else (guide[1], gather_rows(guide[0], batch.queries_W))
            row_BD = row_MD[batch.own_target_B]
            margin = FalseNegativeMargin.below_target(row_BD, column_QD, batch.query_B, self.margin)
        return ScoreMask(batch.query_B, batch.query_B, group_Q, self._mask_block, groups.alone_B, hidden_K, margin)


@dataclass(frozen=True)
class _GlobalBatch:
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
    def gather(cls, groups: Groups[Tensor]) -> _GlobalBatch:
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


def _without_targets(target_B: Tensor, row_K: Tensor, column_K: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the pairs whose column is not the row's target; None if there are none: most steps then need no mask."""
    other_K = target_B[row_K] != column_K
    return (row_K[other_K], column_K[other_K]) if bool(other_K.any()) else None


# --- collectives ------------------------------------------------------------------------------------------------------


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
