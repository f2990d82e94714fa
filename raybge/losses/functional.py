"""Contrastive and distillation losses as pure functions of tensors, one value per query.

All are computed from `softmax_terms`: the logarithm of a softmax's denominator over the passages that a query is
compared with, and the scores of a few passages. It processes the passages block by block, forward and again backward,
so no score matrix wider than a block exists at any time.

Letters in tensor names: B queries, N passages they are compared with, n a block of them, D width of a vector, K
passages whose score is needed, G passages of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raybge.model.precision import full_precision

# mask(start, stop): bool (B, stop - start), True where the query is compared with the passage; None: all with all.
Mask = Callable[[int, int], Tensor | None]


def info_nce(
    q_BD: Tensor, p_ND: Tensor, target_B: Tensor, mask: Mask | None, temperature: float, block: int | None = None
) -> Tensor:
    """Compute InfoNCE: the cross-entropy of each query's positive among the passages it is compared with.

    Contrastive Predictive Coding, https://arxiv.org/abs/1807.03748; with in-batch negatives as in DPR,
    https://arxiv.org/abs/2004.04906.

    Args:
        q_BD: query embeddings.
        p_ND: passage embeddings.
        target_B: index in N of each query's positive, int64.
        mask: which passages each query is compared with; its positive must be among them.
        temperature: scores are divided by it.
        block: passages scored at a time; None scores all at once.

    Returns:
        loss_B, fp32.
    """
    return softmax_terms(q_BD, p_ND, target_B[:, None], mask, temperature, block)[0]


def kl_divergence(score_BG: Tensor, teacher_BG: Tensor) -> Tensor:
    """Compute the KL divergence of the student's softmax over a group from the teacher's, up to a constant.

    Knowledge distillation, Hinton et al. 2015, https://arxiv.org/abs/1503.02531.
    The constant is the teacher's entropy: the value is the cross-entropy under the teacher's softmax.

    Args:
        score_BG: student scores, divided by the temperature; -inf where a group is shorter.
        teacher_BG: teacher scores as they are in the data; -inf where a group is shorter.

    Returns:
        loss_B.
    """
    student_BG = torch.log_softmax(score_BG, dim=-1)
    weight_BG = torch.softmax(teacher_BG, dim=-1)
    return -(weight_BG * student_BG.masked_fill(teacher_BG == -torch.inf, 0.0)).sum(dim=-1)


def m3_distillation(rest_B: Tensor, score_BG: Tensor, teacher_BG: Tensor) -> Tensor:
    """Compute the distillation loss of BGE-M3, https://arxiv.org/abs/2402.03216.

    Each passage of the group in turn is the positive, among those after it in the group and all passages of other
    groups; the teacher's softmax weights the terms.

    Args:
        rest_B: denominator of `softmax_terms` over the passages of other groups; -inf if there are none.
        score_BG: student scores, divided by the temperature; -inf where a group is shorter.
        teacher_BG: teacher scores as they are in the data; -inf where a group is shorter.

    Returns:
        loss_B.
    """
    exists_BG = teacher_BG != -torch.inf
    # Relative to the first passage, like rest_B. The minimum instead of -inf, whose gradient would be NaN.
    score_BG = torch.where(exists_BG, score_BG - score_BG[:, :1], torch.finfo(score_BG.dtype).min)
    later_GG = torch.ones(score_BG.shape[1], score_BG.shape[1], device=score_BG.device).triu().bool()
    later_BG = torch.where(later_GG, score_BG[:, None, :], torch.finfo(score_BG.dtype).min).logsumexp(dim=-1)
    loss_BG = torch.logaddexp(later_BG, rest_B[:, None]) - score_BG
    weight_BG = torch.softmax(teacher_BG, dim=-1)
    return (weight_BG * torch.where(exists_BG, loss_BG, 0.0)).sum(dim=-1)


def softmax_terms(
    q_BD: Tensor, p_ND: Tensor, pick_BK: Tensor, mask: Mask | None, temperature: float, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the softmax denominator of each row of q_BD @ p_ND.T / temperature, and single scores of it.

    Args:
        q_BD: query embeddings.
        p_ND: passage embeddings.
        pick_BK: indices in N of the passages whose score is needed, int64; -1 for none.
        mask: which passages each query is compared with.
        temperature: scores are divided by it.
        block: passages scored at a time; None scores all at once.

    Returns:
        denominator_B: log-sum-exp of the scores under the mask, minus the score of the first pick: the difference
            keeps the digits that a small loss has. -inf where the mask is empty.
        score_BK: scores of the picks, -inf for none.
    """
    with full_precision(q_BD.device):  # a score of 1 / temperature needs more than bf16's 8 bits or TF32's 11
        terms: tuple[Tensor, Tensor] = _SoftmaxTerms.apply(
            q_BD.float(), p_ND.float(), pick_BK, mask, temperature, block or max(1, len(p_ND))
        )
    return terms


class _SoftmaxTerms(torch.autograd.Function):
    """`softmax_terms` block by block: the backward pass computes each block's scores again."""

    @staticmethod
    def forward(
        ctx: Any, q_BD: Tensor, p_ND: Tensor, pick_BK: Tensor, mask: Mask | None, temperature: float, block: int
    ) -> tuple[Tensor, Tensor]:
        score_BK = torch.einsum("bd,bkd->bk", q_BD, p_ND[pick_BK.clamp(min=0)]) / temperature
        score_BK = score_BK.masked_fill(pick_BK < 0, -torch.inf)
        denominator_B = q_BD.new_full((len(q_BD),), -torch.inf)
        for start in range(0, len(p_ND), block):
            score_Bn, _ = _block_scores(q_BD, p_ND, mask, temperature, start, block)
            denominator_B = torch.logaddexp(denominator_B, torch.logsumexp(score_Bn - score_BK[:, :1], dim=1))
        ctx.save_for_backward(q_BD, p_ND, pick_BK, denominator_B, score_BK[:, 0])
        ctx.settings = mask, temperature, block
        return denominator_B, score_BK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(ctx.saved_tensors[0].device):
            return *_softmax_gradients(ctx, *grads), None, None, None, None


def _softmax_gradients(ctx: Any, grad_denominator_B: Tensor, grad_score_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Return grad_q_BD and grad_p_ND of `softmax_terms`."""
    q_BD, p_ND, pick_BK, denominator_B, first_B = ctx.saved_tensors
    mask, temperature, block = ctx.settings
    # The first pick's score is subtracted from the denominator.
    grad_score_BK = grad_score_BK.masked_fill(pick_BK < 0, 0.0)
    grad_score_BK[:, 0] -= grad_denominator_B
    grad_q_BD, grad_p_ND = torch.zeros_like(q_BD), torch.empty_like(p_ND)
    for start in range(0, len(p_ND), block):
        score_Bn, hidden_Bn = _block_scores(q_BD, p_ND, mask, temperature, start, block)
        grad_Bn = torch.exp(score_Bn - (denominator_B + first_B)[:, None]) * grad_denominator_B[:, None]
        if hidden_Bn is not None:
            grad_Bn = grad_Bn.masked_fill(hidden_Bn, 0.0)  # 0 * NaN for a query that is compared with nothing
        in_block_BK = (pick_BK >= start) & (pick_BK < start + grad_Bn.shape[1])
        column_BK = torch.where(in_block_BK, pick_BK - start, 0)
        grad_Bn.scatter_add_(1, column_BK, torch.where(in_block_BK, grad_score_BK, 0.0))
        grad_Bn /= temperature
        grad_q_BD += grad_Bn @ p_ND[start : start + block]
        grad_p_ND[start : start + block] = grad_Bn.T @ q_BD
    return grad_q_BD, grad_p_ND


def _block_scores(
    q_BD: Tensor, p_ND: Tensor, mask: Mask | None, temperature: float, start: int, block: int
) -> tuple[Tensor, Tensor | None]:
    """Return score_Bn of one block of passages, -inf under the mask, and hidden_Bn, None without a mask."""
    stop = min(start + block, len(p_ND))
    score_Bn = q_BD @ p_ND[start:stop].T / temperature
    visible_Bn = mask(start, stop) if mask else None
    if visible_Bn is None:
        return score_Bn, None
    return score_Bn.masked_fill(~visible_Bn, -torch.inf), ~visible_Bn
