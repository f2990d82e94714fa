"""Contrastive objective over all workers, with the gradient of one process that holds the whole batch.

The steps of `Objective.loss`:

1. `GlobalBatch.gather`: exchange the sizes and find the own groups' positions in the global batch.
2. `gather_rows`: all-gather the passages, so that each worker compares its own B queries with the passages of all W
   workers. The gather is differentiable: its backward pass sums, with a reduce-scatter, the gradients that every
   worker's queries have with respect to a passage.
3. `DirectionMasks`: which texts count as negatives (`direction_masks.py`, `masks.py`).
4. `softmax_terms` and the losses on it (`functional.py`): one value per own query, for each Matryoshka dimension.
5. The sum, scaled by W / Q. Data-parallel training averages parameter gradients over workers, so the result is the
   gradient of the mean over all Q queries, whatever W is.

Memory is bounded in two places: `EmbeddingModel.embed` recomputes sub-batches in its backward pass (GradCache,
https://arxiv.org/abs/2101.06983), and `score_block` scores that many passages at a time.

Letters in tensor names: B own queries, M own passages, N passages of all workers, Q queries of all workers, D width of
a vector, G passages of a group, T targets of a query, W workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from raybge.data.step_batch import Groups
from raybge.losses.direction_masks import (
    DOC_TO_DOC,
    DOC_TO_QUERY,
    QUERY_TO_DOC,
    QUERY_TO_QUERY,
    CosineLimit,
    DirectionMasks,
)
from raybge.losses.functional import (
    cosent,
    info_nce,
    kl_divergence,
    m3_distillation,
    margin_mse,
    score_mse,
    soft_targets,
    softmax_terms,
)
from raybge.losses.global_batch import GlobalBatch, gather_rows
from raybge.losses.hardness import HardnessWeights
from raybge.losses.masks import ScoreMask

Observe = Callable[[Tensor, Tensor, ScoreMask], None]


@dataclass(frozen=True)
class Objective:
    """Training objective: the loss, and which texts count as negatives.

    Args:
        temperature: scores are divided by it.
        in_batch: passages of other groups are negatives.
        cross_device: negatives come from the whole global batch, otherwise from the query's block.
        block: groups per block of the global batch; a block does not depend on which workers hold its groups.
        directions: comparisons in the loss, "query_to_doc" among them; see `direction_masks.DIRECTIONS`. With all four
            it is the improved contrastive loss of GTE, https://arxiv.org/abs/2308.03281; without "doc_to_query" that of
            Qwen3-Embedding, https://arxiv.org/abs/2506.05176.
        partition_mode: "joint" is one softmax over all directions; "per_direction" is the mean of one loss for each of
            "query_to_doc" and "doc_to_query", as in CLIP, https://arxiv.org/abs/2103.00020.
        hardness_mode: negatives that are weighted by their closeness; see `HardnessWeights`. None: no weights.
        hardness_strength: factor of the cosine in these weights.
        hardness_normalize: the weights of a query's negatives have mean 1.
        distillation: "kl_div", "margin_mse", "score_mse" and "cosent" are added to the contrastive loss; "m3_kd_loss"
            (BGE-M3, https://arxiv.org/abs/2402.03216) replaces it; "soft_labels" gives it several targets.
        teacher_temperature: teacher scores are divided by it.
        contrastive_weight: factor of the contrastive loss where a distillation loss is added to it.
        score_bands: bounds and labels of "soft_labels"; see `functional.soft_targets`.
        mrl_dims: Matryoshka dimensions, https://arxiv.org/abs/2205.13147: the loss is the mean over these prefixes of
            the vectors.
        normalized: vectors have length 1, and their prefixes are scaled to it.
        mask_known: texts that the data states to be no negatives are none; see `DirectionMasks`.
        margin: a text whose cosine is above the positive's cosine minus the margin is no negative (GISTEmbed,
            https://arxiv.org/abs/2402.16829).
        score_block: passages scored at a time; None scores all at once.
    """

    temperature: float
    in_batch: bool = True
    cross_device: bool = True
    block: int = 0
    directions: tuple[str, ...] = (QUERY_TO_DOC,)
    partition_mode: str = "joint"
    hardness_mode: str | None = None
    hardness_strength: float = 0.0
    hardness_normalize: bool = False
    distillation: str | None = None
    teacher_temperature: float = 1.0
    contrastive_weight: float = 1.0
    score_bands: tuple[tuple[float, float], ...] = ()
    mrl_dims: tuple[int, ...] = ()
    normalized: bool = True
    mask_known: bool = True
    margin: float | None = None
    score_block: int | None = None

    def loss(
        self,
        q_BD: Tensor,
        p_MD: Tensor,
        groups: Groups[Tensor],
        guide: tuple[Tensor, Tensor] | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Compute this worker's share of the loss; its mean over workers is the mean over all queries of the step.

        Collective: all workers call it, a worker without groups with B = 0.

        Args:
            q_BD: embeddings of the own queries.
            p_MD: embeddings of the own passages.
            groups: how the own passages form groups.
            guide: embeddings (B, D'), (M, D') of a guide model, which give the margin's cosines; no gradient. None: the
                cosines are those of q_BD and p_MD.
            observe: called with the own queries, all passages and their mask; it must not call collectives.

        Returns:
            A scalar whose gradient is the one described at the top of this file.
        """
        batch = GlobalBatch.gather(groups)
        p_ND = gather_rows(p_MD, batch.passages_W)
        q_QD = gather_rows(q_BD, batch.queries_W) if {*self.directions} - {QUERY_TO_DOC, DOC_TO_DOC} else None
        limit = self._limit(batch, (q_BD, p_MD), (q_QD, p_ND), guide)
        pick_BG, teacher_BG = self._scored_passages(batch, groups)
        soft_BG = soft_targets(teacher_BG, self.score_bands) if self.distillation == "soft_labels" else None
        masks = self._masks(DirectionMasks(batch, groups, self._mask_block, self.mask_known, limit), pick_BG, soft_BG)
        if observe is not None:
            observe(q_BD.detach(), p_ND.detach(), masks[QUERY_TO_DOC])
        teacher_BG = teacher_BG / self.teacher_temperature

        total_B, total = q_BD.new_zeros(len(q_BD), dtype=torch.float32), q_BD.new_zeros((), dtype=torch.float32)
        for dim in self.mrl_dims or (q_BD.shape[1],):
            q, p, positive = (self._prefix(each, dim) for each in (q_BD, p_ND, p_MD[batch.own_target_B]))
            weights = self._hardness(masks[QUERY_TO_DOC], q, p)
            terms = softmax_terms(q, p, pick_BG, masks[QUERY_TO_DOC], self.temperature, self.score_block, weights)
            denominator_B, score_BG = terms
            if self.distillation == "m3_kd_loss":
                denominator_B = m3_distillation(denominator_B, score_BG, teacher_BG)
            queries = None if q_QD is None else self._prefix(q_QD, dim)
            others = [
                self._denominator(name, (q, positive), (queries, p), batch, mask, score_BG[:, 0])
                for name, mask in masks.items()
                if name != QUERY_TO_DOC
            ]
            loss_B = self._combine([denominator_B, *others], score_BG, soft_BG)
            if self.distillation in _ADDED:
                loss_B = self.contrastive_weight * loss_B + self._distilled(score_BG, teacher_BG)
            total_B = total_B + loss_B
            if self.distillation == "cosent":
                total = total + self._cosent(score_BG, teacher_BG, batch)
        share = total_B.sum() * len(batch.queries_W) / sum(batch.queries_W)
        return (share + total) / max(1, len(self.mrl_dims))

    # --- the contrastive loss ---

    def _denominator(
        self,
        direction: str,
        rows: tuple[Tensor, Tensor],
        columns: tuple[Tensor | None, Tensor],
        batch: GlobalBatch,
        mask: ScoreMask,
        score_B: Tensor,
    ) -> Tensor:
        """Compute a direction's log-sum-exp minus the score of each query and its positive.

        Args:
            direction: one of DIRECTIONS.
            rows: the own queries and their positives, (B, D) each.
            columns: all queries (Q, D), None if no direction needs them, and all passages (N, D).
            batch: positions of the own groups.
            mask: mask of the direction.
            score_B: score of each query and its positive.

        Returns:
            denominator_B.
        """
        row, column = (("query", "doc").index(kind) for kind in direction.split("_to_"))
        row_BD, column_ND = rows[row], columns[column]
        assert column_ND is not None
        if direction == DOC_TO_QUERY:
            return info_nce(row_BD, column_ND, batch.query_B, mask, self.temperature, self.score_block)
        none = batch.query_B[:, None][:, :0]
        return softmax_terms(row_BD, column_ND, none, mask, self.temperature, self.score_block, reference_B=score_B)[0]

    def _combine(self, denominators: list[Tensor], score_BG: Tensor, soft_BG: Tensor | None) -> Tensor:
        """Return the contrastive loss of each query from the denominators of all directions, (B,) each."""
        target_B = 0.0
        if soft_BG is not None:  # the denominators are relative to the positive's score
            target_B = (soft_BG * torch.where(soft_BG > 0, score_BG - score_BG[:, :1], 0.0)).sum(dim=-1)
        if len(denominators) == 1:  # which is InfoNCE
            return denominators[0] - target_B
        if self.partition_mode == "per_direction":
            return (sum(denominators[1:], denominators[0]) - target_B) / len(denominators)
        return torch.stack(denominators).logsumexp(dim=0) - target_B

    def _hardness(self, mask: ScoreMask, q_BD: Tensor, p_ND: Tensor) -> HardnessWeights | None:
        """Return the weights of the negatives of "query_to_doc"."""
        if self.hardness_mode is None:
            return None
        weights = HardnessWeights(self.hardness_mode, self.hardness_strength, mask)
        return weights.normalized(q_BD, p_ND, self.score_block) if self.hardness_normalize else weights

    def _prefix(self, x_RD: Tensor, dim: int) -> Tensor:
        """Return the first `dim` numbers of each vector, at length 1 if the vectors have it."""
        if dim == x_RD.shape[1]:
            return x_RD
        return normalize(x_RD[:, :dim], dim=-1) if self.normalized else x_RD[:, :dim]

    # --- distillation ---

    def _distilled(self, score_BG: Tensor, teacher_BG: Tensor) -> Tensor:
        """Return the distillation loss of each query that is added to the contrastive one; (B,)."""
        if self.distillation == "kl_div":
            return kl_divergence(score_BG, teacher_BG)
        if self.distillation == "cosent":  # one loss over all pairs
            return score_BG.new_zeros(len(score_BG))
        similarity_BG = torch.where(teacher_BG == -torch.inf, 0.0, score_BG) * self.temperature
        return (margin_mse if self.distillation == "margin_mse" else score_mse)(similarity_BG, teacher_BG)

    def _cosent(self, score_BG: Tensor, teacher_BG: Tensor, batch: GlobalBatch) -> Tensor:
        """Return the CoSENT loss of all pairs of the global batch, the same on every worker.

        Each worker has the gradient of the whole loss with respect to all scores. The gather's backward pass adds up
        these W equal gradients and data-parallel training divides by W.
        """
        exists_BG = teacher_BG != -torch.inf
        scores_N, teacher_N = (gather_rows(each[exists_BG], batch.passages_W) for each in (score_BG, teacher_BG))
        return cosent(scores_N, teacher_N)

    def _scored_passages(self, batch: GlobalBatch, groups: Groups[Tensor]) -> tuple[Tensor, Tensor]:
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

    # --- masks ---

    @property
    def _mask_block(self) -> int | None:
        """Groups whose passages a query is compared with: a block of this size, or None for all."""
        if not self.in_batch:
            return 1
        return None if self.cross_device else self.block

    def _limit(
        self,
        batch: GlobalBatch,
        own: tuple[Tensor, Tensor],
        columns: tuple[Tensor | None, Tensor],
        guide: tuple[Tensor, Tensor] | None,
    ) -> CosineLimit | None:
        """Compute the limit of a negative's cosine. Collective with a guide.

        Args:
            batch: positions of the own groups.
            own: vectors of the own queries and passages.
            columns: vectors of all queries, None if no direction needs them, and of all passages.
            guide: vectors of the own queries and passages by the guide model.

        Returns:
            The limit; None without a margin.
        """
        if self.margin is None:
            return None
        if guide is not None:
            queries = None if columns[0] is None else gather_rows(guide[0], batch.queries_W)
            own, columns = guide, (queries, gather_rows(guide[1], batch.passages_W))
        return CosineLimit.below_positive(own[0], own[1][batch.own_target_B], *columns, self.margin)

    def _masks(self, masks: DirectionMasks, pick_BG: Tensor, soft_BG: Tensor | None) -> dict[str, ScoreMask]:
        """Return the mask of each direction, that of "query_to_doc" first."""
        target_BT = None if soft_BG is None else torch.where(soft_BG > 0, pick_BG, pick_BG[:, :1])
        # m3_kd_loss adds the own group itself.
        first = masks.mask(QUERY_TO_DOC, target_BT, others_only=self.distillation == "m3_kd_loss")
        others = [name for name in (DOC_TO_QUERY, QUERY_TO_QUERY, DOC_TO_DOC) if name in self.directions]
        return {QUERY_TO_DOC: first} | {name: masks.mask(name) for name in others}


_ADDED = ("kl_div", "margin_mse", "score_mse", "cosent")  # distillation losses that are added to the contrastive one
