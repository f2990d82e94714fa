"""Contrastive and distillation losses as pure functions of tensors, one value per query.

All are computed from `softmax_terms`: the logarithm of a softmax's denominator over the passages that a query is
compared with, and the scores of a few passages. It processes the passages block by block, forward and again backward,
so no score matrix wider than a block exists at any time.

Letters in tensor names: B queries, N passages they are compared with, n a block of them, D width of a vector, K
passages whose score is needed, G passages of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raybge.model.precision import full_precision

# mask(start, stop): bool (B, stop - start), True where the query is compared with the passage; None: all with all.
Mask = Callable[[int, int], Tensor | None]
# log_weight(similarity_Bn, start, stop): logarithm (B, stop - start) of the weight of each passage's term of the
# softmax's denominator, from the inner products; it has no gradient.
LogWeight = Callable[[Tensor, int, int], Tensor]


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


def margin_mse(similarity_BG: Tensor, teacher_BG: Tensor) -> Tensor:
    """Compute the mean squared error between the student's and the teacher's margins of a group's positive.

    MarginMSE, https://arxiv.org/abs/2010.02666.

    Args:
        similarity_BG: inner products of the query with each passage, its positive first; any value where a group is
            shorter.
        teacher_BG: teacher scores; -inf where a group is shorter.

    Returns:
        loss_B, the mean over the group's negatives; 0 for a group without negatives.
    """
    error_BG = similarity_BG[:, :1] - similarity_BG - (teacher_BG[:, :1] - teacher_BG)
    exists_BG = teacher_BG != -torch.inf
    # The positive's own margin is 0 for both.
    return torch.where(exists_BG, error_BG, 0.0).square().sum(dim=-1) / (exists_BG.sum(dim=-1) - 1).clamp(min=1)


def score_mse(similarity_BG: Tensor, teacher_BG: Tensor) -> Tensor:
    """Compute the mean squared error between the student's inner products and the teacher's scores.

    As in Sentence-BERT's regression objective, https://arxiv.org/abs/1908.10084.

    Args:
        similarity_BG: inner products of the query with each passage; any value where a group is shorter.
        teacher_BG: teacher scores; -inf where a group is shorter.

    Returns:
        loss_B, the mean over the group's passages.
    """
    exists_BG = teacher_BG != -torch.inf
    return torch.where(exists_BG, similarity_BG - teacher_BG, 0.0).square().sum(dim=-1) / exists_BG.sum(dim=-1)


def cosent(score_N: Tensor, teacher_N: Tensor) -> Tensor:
    """Compute the CoSENT loss: it orders the scores of all pairs of a query and a passage as the teacher does.

    CoSENT, https://doi.org/10.1109/TASLP.2024.3402087.

    Args:
        score_N: student scores of the pairs, divided by the temperature.
        teacher_N: teacher scores of the pairs.

    Returns:
        A scalar: log(1 + sum of exp(score_j - score_i) over all pairs i that the teacher scores above j).
    """
    teacher_N, order_N = teacher_N.sort()
    score_N = score_N[order_N]
    # logsumexp of -score over all pairs above each, without a matrix of N x N.
    above_N = torch.logcumsumexp(-score_N.flip(0), dim=0).flip(0)
    above_N = torch.cat([above_N, above_N.new_full((1,), -torch.inf)])
    first_above_N = torch.searchsorted(teacher_N, teacher_N, right=True)
    return torch.cat([score_N.new_zeros(1), score_N + above_N[first_above_N]]).logsumexp(dim=0)


def soft_targets(teacher_BG: Tensor, bands: Sequence[tuple[float, float]]) -> Tensor:
    """Return the target distribution over a group that its teacher scores give by bands.

    The label of a passage is that of the highest bound that its score reaches, 0 below all bounds. Labels of a group
    are divided by their sum; a group whose labels are all 0 has its positive as the only target.

    Args:
        teacher_BG: teacher scores, the positive's first; -inf where a group is shorter.
        bands: bounds, ascending, each with its label.

    Returns:
        weight_BG, which sum to 1.
    """
    bounds, labels = zip(*bands, strict=True)
    label = torch.tensor([0.0, *labels], device=teacher_BG.device)
    weight_BG = label[torch.bucketize(teacher_BG, torch.tensor(bounds, device=teacher_BG.device), right=True)]
    weight_BG[:, 0] = torch.where(weight_BG.sum(dim=-1) > 0, weight_BG[:, 0], 1.0)
    return weight_BG / weight_BG.sum(dim=-1, keepdim=True)


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
    q_BD: Tensor,
    p_ND: Tensor,
    pick_BK: Tensor,
    mask: Mask | None,
    temperature: float,
    block: int | None = None,
    log_weight: LogWeight | None = None,
    reference_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the softmax denominator of each row of q_BD @ p_ND.T / temperature, and single scores of it.

    Args:
        q_BD: query embeddings.
        p_ND: passage embeddings.
        pick_BK: indices in N of the passages whose score is needed, int64; -1 for none.
        mask: which passages each query is compared with.
        temperature: scores are divided by it.
        block: passages scored at a time; None scores all at once.
        log_weight: weights of the denominator's terms; None: 1.
        reference_B: scores that are subtracted from the denominator; None: those of the first pick.

    Returns:
        denominator_B: log-sum-exp of the scores under the mask, minus the reference: the difference keeps the digits
            that a small loss has. -inf where the mask is empty.
        score_BK: scores of the picks, -inf for none.
    """
    with full_precision(q_BD.device):  # a score of 1 / temperature needs more than bf16's 8 bits or TF32's 11
        terms: tuple[Tensor, Tensor] = _SoftmaxTerms.apply(
            q_BD.float(),
            p_ND.float(),
            pick_BK,
            reference_B,
            (mask, temperature, log_weight, block or max(1, len(p_ND))),
        )
    return terms


def log_mean_weight(
    q_BD: Tensor, p_ND: Tensor, chosen: Callable[[int, int], Tensor], strength: float, block: int | None = None
) -> Tensor:
    """Compute the logarithm of the mean of exp(strength * q_BD @ p_ND.T) over chosen passages; no gradient.

    Args:
        q_BD: query embeddings.
        p_ND: passage embeddings.
        chosen: (start, stop) to bool (B, stop - start), True where the passage belongs to the query's mean.
        strength: factor of the inner products.
        block: passages scored at a time; None scores all at once.

    Returns:
        (B,) in fp32, 0 for a query without a chosen passage.
    """
    block = block or max(1, len(p_ND))
    with torch.no_grad(), full_precision(q_BD.device):
        q_BD, p_ND = q_BD.float(), p_ND.float()
        total_B, count_B = q_BD.new_full((len(q_BD),), -torch.inf), q_BD.new_zeros(len(q_BD))
        for start in range(0, len(p_ND), block):
            stop = min(start + block, len(p_ND))
            chosen_Bn = chosen(start, stop)
            log_Bn = (q_BD @ p_ND[start:stop].T * strength).masked_fill(~chosen_Bn, -torch.inf)
            total_B, count_B = torch.logaddexp(total_B, log_Bn.logsumexp(dim=1)), count_B + chosen_Bn.sum(dim=1)
        return torch.where(count_B > 0, total_B - count_B.log(), 0.0)


_Settings = tuple[Mask | None, float, LogWeight | None, int]  # mask, temperature, weights, passages of a block


class _SoftmaxTerms(torch.autograd.Function):
    """`softmax_terms` block by block: the backward pass computes each block's scores again."""

    @staticmethod
    def forward(
        ctx: Any, q_BD: Tensor, p_ND: Tensor, pick_BK: Tensor, reference_B: Tensor | None, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        block = settings[-1]
        score_BK = torch.einsum("bd,bkd->bk", q_BD, p_ND[pick_BK.clamp(min=0)]) / settings[1]
        score_BK = score_BK.masked_fill(pick_BK < 0, -torch.inf)
        ctx.is_first = reference_B is None
        reference_B = score_BK[:, 0] if reference_B is None else reference_B
        denominator_B = q_BD.new_full((len(q_BD),), -torch.inf)
        for start in range(0, len(p_ND), block):
            score_Bn, _ = _block_scores(q_BD, p_ND, settings, start)
            denominator_B = torch.logaddexp(denominator_B, torch.logsumexp(score_Bn - reference_B[:, None], dim=1))
        ctx.save_for_backward(q_BD, p_ND, pick_BK, denominator_B, reference_B)
        ctx.settings = settings
        return denominator_B, score_BK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(ctx.saved_tensors[0].device):
            return *_softmax_gradients(ctx, *grads), None, None if ctx.is_first else -grads[0], None


def _softmax_gradients(ctx: Any, grad_denominator_B: Tensor, grad_score_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Return grad_q_BD and grad_p_ND of `softmax_terms`."""
    q_BD, p_ND, pick_BK, denominator_B, reference_B = ctx.saved_tensors
    temperature, block = ctx.settings[1], ctx.settings[-1]
    grad_score_BK = grad_score_BK.masked_fill(pick_BK < 0, 0.0)
    if ctx.is_first:  # the first pick's score is subtracted from the denominator
        grad_score_BK[:, 0] -= grad_denominator_B
    grad_q_BD, grad_p_ND = torch.zeros_like(q_BD), torch.empty_like(p_ND)
    for start in range(0, len(p_ND), block):
        score_Bn, hidden_Bn = _block_scores(q_BD, p_ND, ctx.settings, start)
        grad_Bn = torch.exp(score_Bn - (denominator_B + reference_B)[:, None]) * grad_denominator_B[:, None]
        if hidden_Bn is not None:
            grad_Bn = grad_Bn.masked_fill(hidden_Bn, 0.0)  # 0 * NaN for a query that is compared with nothing
        in_block_BK = (pick_BK >= start) & (pick_BK < start + grad_Bn.shape[1])
        column_BK = torch.where(in_block_BK, pick_BK - start, 0)
        grad_Bn.scatter_add_(1, column_BK, torch.where(in_block_BK, grad_score_BK, 0.0))
        grad_Bn /= temperature
        grad_q_BD += grad_Bn @ p_ND[start : start + block]
        grad_p_ND[start : start + block] = grad_Bn.T @ q_BD
    return grad_q_BD, grad_p_ND


def _block_scores(q_BD: Tensor, p_ND: Tensor, settings: _Settings, start: int) -> tuple[Tensor, Tensor | None]:
    """Return score_Bn of one block of passages, -inf under the mask, and hidden_Bn, None without a mask."""
    mask, temperature, log_weight, block = settings
    stop = min(start + block, len(p_ND))
    similarity_Bn = q_BD @ p_ND[start:stop].T
    score_Bn = similarity_Bn / temperature
    if log_weight is not None:
        score_Bn = score_Bn + log_weight(similarity_Bn, start, stop)
    visible_Bn = mask(start, stop) if mask else None
    if visible_Bn is None:
        return score_Bn, None
    return score_Bn.masked_fill(~visible_Bn, -torch.inf), ~visible_Bn
