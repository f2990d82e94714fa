"""Contrastive and distillation losses as pure functions of tensors, one value a query.

All rest on `scores`: the logarithm of a softmax's denominator over the passages that a query sees, and the scores of a
few passages. It goes through the passages block by block, forwards and again backwards, so that no score matrix wider
than a block is ever there.

Letters in tensor names: B queries, N passages they are compared with, D width of a vector, K passages whose score is
asked for, G passages of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# mask(start, stop): bool (B, stop - start), True where the query sees the passage, or None where all see all.
Mask = Callable[[int, int], Tensor | None]


def info_nce(
    q_BD: Tensor, p_ND: Tensor, targets_B: Tensor, mask: Mask | None, temperature: float, block: int | None = None
) -> Tensor:
    """InfoNCE: the cross-entropy of each query's positive among the passages it may see.

    Contrastive Predictive Coding, https://arxiv.org/abs/1807.03748; with in-batch negatives as in DPR,
    https://arxiv.org/abs/2004.04906.

    Args:
        q_BD, p_ND: embeddings, fp32.
        targets_B: index in N of each query's positive.
        mask: which passages each query sees; a query always sees its positive.
        temperature: scores are divided by it.
        block: passages scored at a time; None scores all at once.

    Returns:
        loss_B.
    """
    return scores(q_BD, p_ND, targets_B[:, None], mask, temperature, block)[0]


def kl_divergence(at_BG: Tensor, teacher_BG: Tensor) -> Tensor:
    """Cross-entropy of the student's softmax over a group under the teacher's: their KL divergence but for a constant.

    Args:
        at_BG: the student's scores, divided by the temperature.
        teacher_BG: the teacher's, as given. Both are -inf where a group has no such passage.

    Returns:
        loss_B.
    """
    student_BG = torch.log_softmax(at_BG, dim=-1)
    weight_BG = torch.softmax(teacher_BG, dim=-1)
    return -(weight_BG * student_BG.masked_fill(teacher_BG == -torch.inf, 0.0)).sum(dim=-1)


def m3_distillation(rest_B: Tensor, at_BG: Tensor, teacher_BG: Tensor) -> Tensor:
    """BGE-M3's distillation, https://arxiv.org/abs/2402.03216: each passage of the group in turn is the positive, among
    those after it in the group and all others; the teacher's softmax weighs the turns.

    Args:
        rest_B: from `scores`, over what the query sees outside its group; -inf where that is nothing.
        at_BG, teacher_BG: as in `kl_divergence`.

    Returns:
        loss_B.
    """
    there_BG = teacher_BG != -torch.inf
    # Relative to the first passage, as rest_B is. Not -inf where there is none: its gradient would not be a number.
    at_BG = torch.where(there_BG, at_BG - at_BG[:, :1], torch.finfo(at_BG.dtype).min)
    later_GG = torch.ones(at_BG.shape[1], at_BG.shape[1], device=at_BG.device).triu().bool()
    later_BG = torch.where(later_GG, at_BG[:, None, :], torch.finfo(at_BG.dtype).min).logsumexp(dim=-1)
    loss_BG = torch.logaddexp(later_BG, rest_B[:, None]) - at_BG
    weight_BG = torch.softmax(teacher_BG, dim=-1)
    return (weight_BG * torch.where(there_BG, loss_BG, 0.0)).sum(dim=-1)


def scores(
    q_BD: Tensor, p_ND: Tensor, picks_BK: Tensor, mask: Mask | None, temperature: float, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """What a loss needs of the score matrix q_BD @ p_ND.T / temperature.

    Args:
        picks_BK: int64, indices in N of the passages whose score is asked for; -1 for none.

    The other arguments are those of `info_nce`.

    Returns:
        denominator_B: log-sum-exp of the scores that the query sees, less the score of its first pick; the difference
            keeps the digits that a small loss has. -inf where it sees nothing.
        at_BK: the scores of the picks, -inf for none.
    """
    with torch.autocast(q_BD.device.type, enabled=False):  # a score of 1 / temperature needs more than bf16's 8 bits
        return _Scores.apply(q_BD.float(), p_ND.float(), picks_BK, mask, temperature, block or max(1, len(p_ND)))


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BD: Tensor, p_ND: Tensor, picks_BK: Tensor, mask: Mask | None, temperature: float, block: int
    ) -> tuple[Tensor, Tensor]:
        at_BK = torch.einsum("bd,bkd->bk", q_BD, p_ND[picks_BK.clamp(min=0)]) / temperature
        at_BK = at_BK.masked_fill(picks_BK < 0, -torch.inf)
        denominator_B = q_BD.new_full((len(q_BD),), -torch.inf)
        for start in range(0, len(p_ND), block):
            score_Bn, _ = _block(q_BD, p_ND, mask, temperature, start, block)
            denominator_B = torch.logaddexp(denominator_B, torch.logsumexp(score_Bn - at_BK[:, :1], dim=1))
        ctx.save_for_backward(q_BD, p_ND, picks_BK, denominator_B, at_BK[:, 0])
        ctx.settings = mask, temperature, block
        return denominator_B, at_BK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_denominator_B, grad_at_BK = grads
        q_BD, p_ND, picks_BK, denominator_B, first_B = ctx.saved_tensors
        mask, temperature, block = ctx.settings
        # The first pick's score is subtracted from the denominator.
        grad_at_BK = grad_at_BK.masked_fill(picks_BK < 0, 0.0)
        grad_at_BK[:, 0] -= grad_denominator_B
        grad_q_BD, grad_p_ND = torch.zeros_like(q_BD), torch.empty_like(p_ND)
        for start in range(0, len(p_ND), block):
            score_Bn, hidden_Bn = _block(q_BD, p_ND, mask, temperature, start, block)
            grad_Bn = torch.exp(score_Bn - (denominator_B + first_B)[:, None]) * grad_denominator_B[:, None]
            if hidden_Bn is not None:
                grad_Bn = grad_Bn.masked_fill(hidden_Bn, 0.0)  # 0 * nan where a query sees nothing
            here_BK = (picks_BK >= start) & (picks_BK < start + grad_Bn.shape[1])
            where_BK = torch.where(here_BK, picks_BK - start, 0)
            grad_Bn.scatter_add_(1, where_BK, torch.where(here_BK, grad_at_BK, 0.0))
            grad_Bn /= temperature
            grad_q_BD += grad_Bn @ p_ND[start : start + block]
            grad_p_ND[start : start + block] = grad_Bn.T @ q_BD
        return grad_q_BD, grad_p_ND, None, None, None, None


def _block(
    q_BD: Tensor, p_ND: Tensor, mask: Mask | None, temperature: float, start: int, block: int
) -> tuple[Tensor, Tensor | None]:
    """Scores of one block of passages, -inf where hidden, and where they are hidden."""
    stop = min(start + block, len(p_ND))
    score_Bn = q_BD @ p_ND[start:stop].T / temperature
    seen_Bn = mask(start, stop) if mask else None
    if seen_Bn is None:
        return score_Bn, None
    return score_Bn.masked_fill(~seen_Bn, -torch.inf), ~seen_Bn
