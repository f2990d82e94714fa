"""One worker's share of a training step: token ids of its texts, and how the texts form groups.

Letters in array names: B groups, one query each; M passages of these groups; R known positives of these queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Array = TypeVar("Array")


@dataclass(frozen=True)
class Groups(Generic[Array]):
    """One worker's groups, one after the other, each with its positive first; numpy arrays or tensors.

    An optional field that is None has no effect on the loss.

    Args:
        passages_B: passages per group, int64.
        alone_B: bool, True where the query is compared with its own group only.
        passage_key_M: key of each passage's text, int64.
        known_B: number of known positives per query, int64.
        known_key_R: keys of the known positives' texts, one query after the other, int64.
        teacher_score_M: teacher score of each passage, fp32.
        query_key_B: key of each query's text, int64.
    """

    passages_B: Array
    alone_B: Array | None = None
    passage_key_M: Array | None = None
    known_B: Array | None = None
    known_key_R: Array | None = None
    teacher_score_M: Array | None = None
    query_key_B: Array | None = None


@dataclass(frozen=True)
class StepBatch:
    """One worker's share of a step: B groups with M passages in total.

    Args:
        step: number of the step within the epoch.
        rows: (file, offset) of each group.
        token_ids: one array of ids per text: B queries, then M passages.
        groups: how the passages form groups.
        guide_ids: like `token_ids`, tokenized for the guide model.
    """

    step: int
    rows: list[tuple[int, int]]
    token_ids: list[np.ndarray]
    groups: Groups[np.ndarray]
    guide_ids: list[np.ndarray] | None = None

    def numel(self) -> int:
        """Return the number of tokens; transformers' Trainer counts them by this name."""
        return sum(map(len, self.token_ids))
