"""The contrastive objective as a pure function of tensors.

Letters in tensor names: B queries, N passages they are compared with, D width of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor


def info_nce(q_BD: Tensor, p_ND: Tensor, targets_B: Tensor, mask_BN: Tensor | None, temperature: float) -> Tensor:
    """InfoNCE: the cross-entropy of each query's positive among the passages it may see.

    Contrastive Predictive Coding, https://arxiv.org/abs/1807.03748; with in-batch negatives as in DPR,
    https://arxiv.org/abs/2004.04906.

    Args:
        q_BD, p_ND: embeddings, fp32.
        targets_B: index in N of each query's positive.
        mask_BN: True where the query sees the passage; None when it sees all. A query always sees its positive.
        temperature: scores are divided by it.

    Returns:
        loss_B, one value a query.
    """
    with torch.autocast(q_BD.device.type, enabled=False):  # a score of 1 / temperature needs more than bf16's 8 bits
        score_BN = q_BD.float() @ p_ND.float().T / temperature
    if mask_BN is not None:
        score_BN = score_BN.masked_fill(~mask_BN, -torch.inf)
    return torch.nn.functional.cross_entropy(score_BN, targets_B, reduction="none")
