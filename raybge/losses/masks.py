"""Masks: which texts of all workers count as negatives of a worker's own texts, block by block and never as a whole.

Letters in tensor names: B own rows (queries, or their positives), N columns (passages, or queries) of all workers, n a
block of them, D width of a vector, T targets of a row, K (row, column) pairs, R row keys, C column keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class FalseNegativeMargin:
    """Mask of likely false negatives: columns whose cosine with the row is above `limit_B`.

    GISTEmbed, https://arxiv.org/abs/2402.16829; with a margin as in NV-Retriever, https://arxiv.org/abs/2407.15831.

    Args:
        row_BD: unit vectors of the rows, without gradient.
        column_ND: vectors of the columns, of any length, without gradient.
        limit_B: highest cosine of a negative.
    """

    row_BD: Tensor
    column_ND: Tensor
    limit_B: Tensor

    def __call__(self, start: int, stop: int) -> Tensor:
        """Return (B, stop - start), True where the column may be a negative."""
        return self.row_BD @ normalize(self.column_ND[start:stop].float(), dim=-1).T <= self.limit_B[:, None]


@dataclass(frozen=True)
class ScoreMask:
    """Mask of the score matrix for `functional.softmax_terms`. A row always sees its targets, unless `others_only`.

    Args:
        target_BT: columns of each row's targets, -1 for none.
        group_B: number of each row's group.
        group_N: number of each column's group.
        block: groups per block: a row sees the columns of its own block, with 1 those of its own group; None: all.
        alone_B: rows that see their own group only.
        hidden_K: (row_K, column_K) of hidden pairs, None for none.
        margin: hides likely false negatives, None for none.
        others_only: a row sees nothing of its own group.
    """

    target_BT: Tensor
    group_B: Tensor
    group_N: Tensor
    block: int | None = None
    alone_B: Tensor | None = None
    hidden_K: tuple[Tensor, Tensor] | None = None
    margin: FalseNegativeMargin | None = None
    others_only: bool = False

    def __call__(self, start: int, stop: int) -> Tensor | None:
        """Return (B, stop - start), True where the row sees the column; None if all rows see all columns."""
        conditions = (self.block, self.alone_B, self.hidden_K, self.margin)
        if not self.others_only and all(condition is None for condition in conditions):
            return None
        own_Bn = self.own_group(start, stop)
        visible_Bn = torch.ones_like(own_Bn)
        if self.block is not None:
            visible_Bn = self.group_B[:, None] // self.block == self.group_N[None, start:stop] // self.block
        if self.alone_B is not None:
            visible_Bn &= own_Bn | ~self.alone_B[:, None]
        if self.margin is not None:
            visible_Bn &= self.margin(start, stop)
        if self.hidden_K is not None:
            row_K, column_K = self.hidden_K
            in_block_K = (column_K >= start) & (column_K < stop)
            visible_Bn[row_K[in_block_K], column_K[in_block_K] - start] = False
        if self.others_only:
            return visible_Bn & ~own_Bn
        return visible_Bn | self.targets(start, stop)

    def targets(self, start: int, stop: int) -> Tensor:
        """Return (B, stop - start), True where the column is a target of the row."""
        target_Bn = torch.zeros(len(self.target_BT), stop - start, dtype=torch.bool, device=self.target_BT.device)
        in_block_BT = (self.target_BT >= start) & (self.target_BT < stop)
        target_Bn[in_block_BT.nonzero(as_tuple=True)[0], self.target_BT[in_block_BT] - start] = True
        return target_Bn

    def own_group(self, start: int, stop: int) -> Tensor:
        """Return (B, stop - start), True where row and column belong to one group."""
        return self.group_B[:, None] == self.group_N[None, start:stop]


def equal_keys(row_R: Tensor, key_R: Tensor, column_C: Tensor, key_C: Tensor) -> tuple[Tensor, Tensor]:
    """Find all (row, column) pairs with an equal key; a row or a column may have several keys.

    Args:
        row_R: row of each row key, int64.
        key_R: row keys, int64.
        column_C: column of each column key, int64.
        key_C: column keys, int64.

    Returns:
        row_K and column_K of the pairs.
    """
    key_C, order_C = key_C.sort()
    key_R = key_R.contiguous()
    first_R = torch.searchsorted(key_C, key_R)
    count_R = torch.searchsorted(key_C, key_R, right=True) - first_R
    source_K = torch.repeat_interleave(torch.arange(len(key_R), device=key_R.device), count_R)
    begin_R = count_R.cumsum(0) - count_R
    offset_K = torch.arange(len(source_K), device=key_R.device) - begin_R[source_K]
    return row_R[source_K], column_C[order_C[first_R[source_K] + offset_K]]
