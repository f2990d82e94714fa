"""Masks of a step: for each direction of the loss, which texts of all workers a worker's own texts are compared with.

A direction is named by its rows and its columns, as in sentence-transformers: the rows are the own queries ("query") or
their positives ("doc"), the columns are the queries or the passages of all workers.

Letters in tensor names: B own queries, M own passages, N passages of all workers, Q queries of all workers, D width of
a vector, T targets of a row, R known positives, K (row, column) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from raybge.data.step_batch import Groups
from raybge.losses.global_batch import GlobalBatch, gather_rows
from raybge.losses.masks import FalseNegativeMargin, ScoreMask, equal_keys

QUERY_TO_DOC, DOC_TO_QUERY = "query_to_doc", "doc_to_query"
QUERY_TO_QUERY, DOC_TO_DOC = "query_to_query", "doc_to_doc"
DIRECTIONS = (QUERY_TO_DOC, DOC_TO_QUERY, QUERY_TO_QUERY, DOC_TO_DOC)

_Pairs = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class CosineLimit:
    """Limit of a negative's cosine, with the vectors that give the cosines, which have no gradient.

    Args:
        query_BD: unit vectors of the own queries.
        positive_BD: unit vectors of their positives.
        query_QD: vectors of all queries, of any length; None if no direction has them as columns.
        doc_ND: vectors of all passages, of any length.
        limit_B: highest cosine of a negative of each query.
    """

    query_BD: Tensor
    positive_BD: Tensor
    query_QD: Tensor | None
    doc_ND: Tensor
    limit_B: Tensor

    @classmethod
    def below_positive(
        cls, query_BD: Tensor, positive_BD: Tensor, query_QD: Tensor | None, doc_ND: Tensor, margin: float
    ) -> CosineLimit:
        """Set the limit to the cosine of each query and its positive, minus the margin.

        Args:
            query_BD: vectors of the own queries, of any length.
            positive_BD: vectors of their positives.
            query_QD: vectors of all queries.
            doc_ND: vectors of all passages.
            margin: least difference between the positive's cosine and that of a negative.

        Returns:
            The limit.
        """
        query_BD, positive_BD = (normalize(each.detach().float(), dim=-1) for each in (query_BD, positive_BD))
        limit_B = (query_BD * positive_BD).sum(dim=-1) - margin
        return cls(query_BD, positive_BD, None if query_QD is None else query_QD.detach(), doc_ND.detach(), limit_B)

    def margin(self, direction: str) -> FalseNegativeMargin:
        """Return the mask of a direction."""
        row, column = direction.split("_to_")
        column_ND = self.doc_ND if column == "doc" else self.query_QD
        assert column_ND is not None
        return FalseNegativeMargin(self.query_BD if row == "query" else self.positive_BD, column_ND, self.limit_B)


@dataclass(frozen=True)
class DirectionMasks:
    """Maker of the masks of one step. Collective: all workers ask for the same directions in the same order.

    Args:
        batch: sizes of the global batch.
        groups: the own groups.
        block: groups whose texts are compared with each other: a block of this size, or None for all.
        mask_known: hide texts that the data states to be no negatives. A passage is none of a query if its text is
            that of a known positive; two queries are none of each other if their texts are equal or if they share a
            known positive; of a positive no passage is one that is none of its query.
        limit: hides likely false negatives; None for none.
    """

    batch: GlobalBatch
    groups: Groups[Tensor]
    block: int | None
    mask_known: bool
    limit: CosineLimit | None

    def mask(self, direction: str, target_BT: Tensor | None = None, others_only: bool = False) -> ScoreMask:
        """Return the mask of a direction.

        Args:
            direction: one of DIRECTIONS.
            target_BT: targets of each query among all passages; None: its positive. Of a positive it is its query.
            others_only: a row sees nothing of its own group, as always where rows and columns are of one kind.

        Returns:
            The mask.
        """
        row, column = direction.split("_to_")
        if target_BT is None:
            target_BT = (self.batch.target_B if column == "doc" else self.batch.query_B)[:, None]
        passages_Q = self.batch.passages_Q
        group_Q = torch.arange(len(passages_Q), device=passages_Q.device)
        group_N = group_Q if column == "query" else group_Q.repeat_interleave(passages_Q, output_size=self._passages)
        return ScoreMask(
            target_BT,
            self.batch.query_B,
            group_N,
            self.block,
            self.groups.alone_B,
            self._hidden_pairs(direction),
            self.limit.margin(direction) if self.limit else None,
            others_only or row == column,
        )

    @property
    def _passages(self) -> int:
        return sum(self.batch.passages_W)

    def _hidden_pairs(self, direction: str) -> _Pairs:
        """Return the (row, column) pairs that the data states to be no negatives, None if there are none."""
        if not self.mask_known or self.groups.passage_key_M is None:
            return None
        if direction == QUERY_TO_QUERY:
            return self._hidden_queries
        return self._hidden_reverse if direction == DOC_TO_QUERY else self._hidden_passages

    @cached_property
    def _own_known(self) -> tuple[Tensor, Tensor]:
        """Row and key of each known positive of the own queries."""
        known_B, known_key_R = self.groups.known_B, self.groups.known_key_R
        assert known_B is not None and known_key_R is not None
        return torch.repeat_interleave(known_B, output_size=len(known_key_R)), known_key_R

    @cached_property
    def _all_known(self) -> tuple[Tensor, Tensor]:
        """Column and key of each known positive of all queries."""
        known_B, known_key_R = self.groups.known_B, self.groups.known_key_R
        assert known_B is not None and known_key_R is not None
        known_Q = gather_rows(known_B, self.batch.queries_W)
        key = gather_rows(known_key_R, self.batch.known_W)
        return torch.repeat_interleave(known_Q, output_size=len(key)), key

    @cached_property
    def _hidden_passages(self) -> _Pairs:
        assert self.groups.passage_key_M is not None
        key_N = gather_rows(self.groups.passage_key_M, self.batch.passages_W)
        column_N = torch.arange(len(key_N), device=key_N.device)
        return _without_targets(self.batch.target_B, *equal_keys(*self._own_known, column_N, key_N))

    @cached_property
    def _hidden_reverse(self) -> _Pairs:
        assert self.groups.passage_key_M is not None
        key_B = self.groups.passage_key_M[self.batch.own_target_B]
        row_B = torch.arange(len(key_B), device=key_B.device)
        return _without_targets(self.batch.query_B, *equal_keys(row_B, key_B, *self._all_known))

    @cached_property
    def _hidden_queries(self) -> _Pairs:
        row_K, column_K = equal_keys(*self._own_known, *self._all_known)
        if self.groups.query_key_B is not None:
            key_B = self.groups.query_key_B
            key_Q = gather_rows(key_B, self.batch.queries_W)
            row_B, column_Q = (torch.arange(len(key), device=key.device) for key in (key_B, key_Q))
            same_row_K, same_column_K = equal_keys(row_B, key_B, column_Q, key_Q)
            row_K, column_K = torch.cat([row_K, same_row_K]), torch.cat([column_K, same_column_K])
        return _without_targets(self.batch.query_B, row_K, column_K)


def _without_targets(target_B: Tensor, row_K: Tensor, column_K: Tensor) -> _Pairs:
    """Return the pairs whose column is not the row's target; None if there are none: most steps then need no mask."""
    other_K = target_B[row_K] != column_K
    return (row_K[other_K], column_K[other_K]) if bool(other_K.any()) else None
