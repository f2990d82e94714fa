"""Hardness weights: a negative's term of the loss counts the more, the closer the negative is to the query.

Letters in tensor names: B queries, N passages they are compared with, n a block of them, D width of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from raybge.losses.functional import log_mean_weight
from raybge.losses.masks import ScoreMask

IN_BATCH, HARD, ALL = "in_batch_negatives", "hard_negatives", "all_negatives"
HARDNESS_MODES = (IN_BATCH, HARD, ALL)


@dataclass(frozen=True)
class HardnessWeights:
    """Weights exp(strength * cosine) of negatives in the softmax's denominator, a `functional.LogWeight`.

    As `hardness_mode` of sentence-transformers defines them: of in-batch negatives by Lan et al.,
    https://arxiv.org/abs/2503.04812, of the row's own negatives by EmbeddingGemma, https://arxiv.org/abs/2509.20354.
    Weights have no gradient. They are inner products where vectors are not normalized.

    Args:
        mode: negatives that are weighted: those of other groups, those of the own group, or both.
        strength: factor of the cosine.
        mask: mask of queries and passages: a target is no negative, nor is a passage that the query does not see.
        shift_B: subtracted from the logarithm of each query's weights; None: 0.
    """

    mode: str
    strength: float
    mask: ScoreMask
    shift_B: Tensor | None = None

    def __call__(self, similarity_Bn: Tensor, start: int, stop: int) -> Tensor:
        """Return the logarithm of the weights, (B, stop - start)."""
        log_Bn = self.strength * similarity_Bn
        if self.shift_B is not None:
            log_Bn = log_Bn - self.shift_B[:, None]
        return torch.where(self._is_weighted(start, stop), log_Bn, 0.0)

    def normalized(self, q_BD: Tensor, p_ND: Tensor, block: int | None) -> Self:
        """Return weights whose mean over a query's weighted negatives is 1.

        Their sum then is that of the negatives' terms under a distribution that prefers close negatives: Robinson et
        al., https://arxiv.org/abs/2010.04592, where `strength` is the concentration divided by the temperature.

        Args:
            q_BD: query embeddings.
            p_ND: passage embeddings.
            block: passages scored at a time; None scores all at once.

        Returns:
            The weights.
        """
        return replace(self, shift_B=log_mean_weight(q_BD, p_ND, self._is_visible_weighted, self.strength, block))

    def _is_visible_weighted(self, start: int, stop: int) -> Tensor:
        weighted_Bn, visible_Bn = self._is_weighted(start, stop), self.mask(start, stop)
        return weighted_Bn if visible_Bn is None else weighted_Bn & visible_Bn

    def _is_weighted(self, start: int, stop: int) -> Tensor:
        """Return (B, stop - start), True for the negatives that `mode` names."""
        negative_Bn = ~self.mask.targets(start, stop)
        if self.mode == ALL:
            return negative_Bn
        own_Bn = self.mask.own_group(start, stop)
        return negative_Bn & (own_Bn if self.mode == HARD else ~own_Bn)
