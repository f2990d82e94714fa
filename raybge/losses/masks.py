"""Which of all workers' texts count as negatives of a worker's own: a mask made block by block, never whole.

Letters in tensor names: B own rows (queries, or positives when the search goes backwards), N columns (passages, or
queries) of all workers, n a block of them, D width, K (row, column) places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class FalseNegativeMargin:
    """Columns whose cosine with the row is above `limit_B` are too good to be negatives."""

    row_BD: Tensor
    column_ND: Tensor
    limit_B: Tensor

    @classmethod
    def below(cls, row_BD: Tensor, column_ND: Tensor, targets_B: Tensor, margin: float) -> FalseNegativeMargin:
        """The limit is the cosine of each row's target less `margin`. Vectors need not have length 1; no gradient."""
        row_BD, column_ND = normalize(row_BD.detach().float(), dim=-1), column_ND.detach()
        target_BD = normalize(column_ND[targets_B].float(), dim=-1)
        return cls(row_BD, column_ND, (row_BD * target_BD).sum(dim=-1) - margin)

    def __call__(self, start: int, stop: int) -> Tensor:
        """True where the column may stay a negative, (B, stop - start)."""
        return self.row_BD @ normalize(self.column_ND[start:stop].float(), dim=-1).T <= self.limit_B[:, None]


@dataclass(frozen=True)
class ScoreMask:
    """A mask as `losses.scores` takes it. A row always sees its target, unless `others_only`.

    Args:
        targets_B: column of each row's target.
        group_B, group_N: number of the group that a row and a column belong to.
        block: a row sees the columns of its own block of so many groups; None: of all. 1: of its own group.
        alone_B: rows that see their own group only.
        hidden_K: rows and columns of places that are hidden, None for none.
        others_only: a row sees nothing of its own group.
    """

    targets_B: Tensor
    group_B: Tensor
    group_N: Tensor
    block: int | None = None
    alone_B: Tensor | None = None
    hidden_K: tuple[Tensor, Tensor] | None = None
    margin: FalseNegativeMargin | None = None
    others_only: bool = False

    def __call__(self, start: int, stop: int) -> Tensor | None:
        """True where the row sees the column, (B, stop - start); None where all see all."""
        acts = (self.block, self.alone_B, self.hidden_K, self.margin)
        if not self.others_only and all(each is None for each in acts):
            return None
        group_B, group_n = self.group_B[:, None], self.group_N[None, start:stop]
        own_Bn = group_B == group_n
        seen_Bn = torch.ones_like(own_Bn) if self.block is None else group_B // self.block == group_n // self.block
        if self.alone_B is not None:
            seen_Bn &= own_Bn | ~self.alone_B[:, None]
        if self.margin is not None:
            seen_Bn &= self.margin(start, stop)
        if self.hidden_K is not None:
            row_K, column_K = self.hidden_K
            here_K = (column_K >= start) & (column_K < stop)
            seen_Bn[row_K[here_K], column_K[here_K] - start] = False
        if self.others_only:
            return seen_Bn & ~own_Bn
        here_B = (self.targets_B >= start) & (self.targets_B < stop)
        seen_Bn[here_B.nonzero().squeeze(1), self.targets_B[here_B] - start] = True
        return seen_Bn


def equal_keys(row_R: Tensor, key_R: Tensor, column_C: Tensor, key_C: Tensor) -> tuple[Tensor, Tensor]:
    """All (row, column) whose keys are equal, as two tensors of the same length; int64 throughout.

    A row or a column may have several keys.
    """
    key_C, order_C = key_C.sort()
    key_R = key_R.contiguous()
    first_R = torch.searchsorted(key_C, key_R)
    count_R = torch.searchsorted(key_C, key_R, right=True) - first_R
    place_K = torch.repeat_interleave(torch.arange(len(key_R), device=key_R.device), count_R)
    begin_R = count_R.cumsum(0) - count_R
    among_K = torch.arange(len(place_K), device=key_R.device) - begin_R[place_K]
    return row_R[place_K], column_C[order_C[first_R[place_K] + among_K]]
