"""Counts of a step's negatives: how many are masked and why, and how many of the others are close to the query.

Letters in tensor names: B own queries, N passages of all workers, n a block of them, D width of a vector, C counts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from raybge.losses.functional import Mask
from raybge.losses.masks import ScoreMask
from raybge.model.precision import full_precision

CLOSE = 0.1  # a negative is close if its cosine is above the positive's cosine minus this
_PAIRS = 1 << 22  # queries times passages of a block


def count_negatives(q_BD: Tensor, p_ND: Tensor, mask: ScoreMask) -> Tensor:
    """Count the pairs of own queries and passages that are negatives by their position in the batch.

    Args:
        q_BD: embeddings of the own queries.
        p_ND: embeddings of all passages.
        mask: mask of the queries and the passages, whose first target is the positive.

    Returns:
        count_C, int64 on the device of the vectors: all pairs; those that are masked because the data states a passage
        to be relevant; those that the margin masks in addition; those that are left and close.
    """
    device, block = q_BD.device, max(1, _PAIRS // max(1, len(q_BD)))
    count_C = torch.zeros(4, dtype=torch.int64, device=device)
    masks: tuple[Mask, ...] = (replace(mask, hidden_K=None, margin=None), replace(mask, margin=None), mask)
    with torch.no_grad(), full_precision(device):
        q_BD = normalize(q_BD.float(), dim=-1)
        positive_BD = normalize(p_ND[mask.target_BT[:, 0]].float(), dim=-1)
        limit_B1 = (q_BD * positive_BD).sum(dim=-1, keepdim=True) - CLOSE
        for start in range(0, len(p_ND), block):
            stop = min(start + block, len(p_ND))
            other_Bn = ~mask.targets(start, stop)
            seen = [other_Bn if (visible_Bn := each(start, stop)) is None else other_Bn & visible_Bn for each in masks]
            close_Bn = seen[2] & (q_BD @ normalize(p_ND[start:stop].float(), dim=-1).T > limit_B1)
            all_pairs, unknown, left = (each.sum() for each in seen)
            count_C += torch.stack([all_pairs, all_pairs - unknown, unknown - left, close_Bn.sum()])
    return count_C
