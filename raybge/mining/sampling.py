"""Choice of negatives among the candidates of a row. Passages are referred to by id alone.

Letters in array names: C candidates, B excluded passages, P positives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from raybge.util.errors import UserError

TRIES = 16  # random passages drawn for each missing negative if scores restrict which may be taken


@dataclass(frozen=True)
class SamplingSpec:
    """Rules for negatives and their choice.

    A passage may be a negative if its score is at most `max_score`, at least `min_score`, and below the score of each
    positive: by `absolute_margin`, and by `relative_margin` of the positive's absolute score (0.05 is the 95% threshold
    of NV-Retriever, https://arxiv.org/abs/2407.15831). None disables a rule.

    Args:
        lo: first rank of the full ranking, 0-based.
        hi: end of the ranks, exclusive.
        number: negatives per row.
        seed: seed of the random choice.
        strategy: "random", or "top" for the highest scores.
        absolute_margin: margin below each positive.
        relative_margin: margin below each positive, as a share of its score.
        max_score: highest score of a negative.
        min_score: lowest score of a negative.
    """

    lo: int
    hi: int
    number: int
    seed: int = 42
    strategy: str = "random"
    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None

    @property
    def by_margin(self) -> bool:
        """True if the positives' scores are needed."""
        return self.absolute_margin is not None or self.relative_margin is not None

    @property
    def by_score(self) -> bool:
        """True if a passage's score is needed."""
        return self.by_margin or self.max_score is not None or self.min_score is not None

    def clipped(self, passages: int) -> SamplingSpec:
        """Limit the ranks to the size of the pool.

        Args:
            passages: passages in the pool.

        Returns:
            The spec with `hi` at most `passages`.

        Raises:
            UserError: no rank of the range exists.
        """
        if self.lo >= passages:
            raise UserError(
                f"--range_for_sampling {self.lo}-{self.hi} is empty: the pool has {passages:,} passages, so ranks end "
                f"at {passages - 1:,}"
            )
        return replace(self, hi=min(self.hi, passages))

    def allows(self, score_C: np.ndarray, positive_P: np.ndarray) -> np.ndarray:
        """Apply the score rules.

        Args:
            score_C: scores of candidates.
            positive_P: scores of the row's positives.

        Returns:
            (C,) bool: true for a candidate that may be a negative.
        """
        limits = [np.inf if self.max_score is None else self.max_score]
        if self.absolute_margin is not None:
            limits.append(float((positive_P - self.absolute_margin).min()))
        if self.relative_margin is not None:
            limits.append(float((positive_P - self.relative_margin * np.abs(positive_P)).min()))
        least = -np.inf if self.min_score is None else self.min_score
        return (score_C <= min(limits)) & (score_C >= least)

    def describe(self) -> str:
        """Return the rules as a plan line."""
        rules = [
            f"{name} {value:g}"
            for name in ("absolute_margin", "relative_margin", "max_score", "min_score")
            if (value := getattr(self, name)) is not None
        ]
        return (
            f"{self.number} negatives per row, {self.strategy}, from ranks {self.lo} to {self.hi - 1}"
            f"{', '.join(['', *rules])}, seed {self.seed}"
        )


@dataclass(frozen=True)
class RowCandidates:
    """Candidates of one row.

    Args:
        ids_C: passage ids of ranks [lo, hi), best first; -1 for none.
        score_C: their scores.
        excluded_B: passages that are never negatives of the row; -1 is ignored.
        positive_P: scores of the row's positives.
        rng: the row's own random generator.
    """

    ids_C: np.ndarray
    score_C: np.ndarray
    excluded_B: np.ndarray
    positive_P: np.ndarray
    rng: np.random.Generator

    def without_excluded(self) -> RowCandidates:
        """Return the row without empty ranks and excluded candidates."""
        keep_C = (self.ids_C >= 0) & ~np.isin(self.ids_C, self.excluded_B)
        return RowCandidates(self.ids_C[keep_C], self.score_C[keep_C], self.excluded_B, self.positive_P, self.rng)


@dataclass(frozen=True)
class SampledNegatives:
    """Negatives of a row; the last `fills` of them are random passages."""

    ids: np.ndarray
    fills: int


def sample(
    rows: Sequence[RowCandidates],
    sampling: SamplingSpec,
    passages: int,
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> list[SampledNegatives]:
    """Choose distinct negatives of each row, none of them excluded.

    If the candidates do not suffice, the rest is drawn from the whole pool; fewer are returned if the pool does not
    suffice either.

    Args:
        rows: candidates of each row.
        sampling: rules and choice.
        passages: passages in the pool, with ids 0 to passages - 1.
        score: called as score(row_N, ids_N) with positions in `rows`; returns the scores of passages for rows. Called
            at most once, and only if scores matter.

    Returns:
        The negatives of each row.
    """
    chosen = [_choose(row, sampling) for row in rows]
    missing = [sampling.number - len(ids) for ids in chosen]
    tries = TRIES if sampling.by_score else 1
    others = [
        _random_passages(np.union1d(ids, row.excluded_B[row.excluded_B >= 0]), count * tries, passages, row.rng)
        if count
        else np.zeros(0, np.int64)
        for row, ids, count in zip(rows, chosen, missing, strict=True)
    ]
    if sampling.by_score and any(map(len, others)):
        counts = [len(ids) for ids in others]
        scores = score(np.repeat(np.arange(len(rows)), counts), np.concatenate(others))
        parts = np.split(scores, np.cumsum(counts)[:-1])
        others = [
            ids[sampling.allows(part, row.positive_P)] for ids, part, row in zip(others, parts, rows, strict=True)
        ]
    return [
        SampledNegatives(np.concatenate([ids, more[:count]]).astype(np.int64), min(count, len(more)))
        for ids, more, count in zip(chosen, others, missing, strict=True)
    ]


def _choose(row: RowCandidates, sampling: SamplingSpec) -> np.ndarray:
    row = row.without_excluded()
    ids_C, score_C = row.ids_C, row.score_C
    if sampling.by_score:
        allowed_C = sampling.allows(score_C, row.positive_P)
        ids_C, score_C = ids_C[allowed_C], score_C[allowed_C]
    if sampling.strategy == "top":
        return ids_C[np.lexsort((ids_C, -score_C))[: sampling.number]]
    # sorted, so that the order of the candidates does not affect the sample
    ids_C = np.sort(ids_C)
    if len(ids_C) >= sampling.number:
        return row.rng.choice(ids_C, sampling.number, replace=False)
    return row.rng.permutation(ids_C)


def _random_passages(excluded: np.ndarray, number: int, passages: int, rng: np.random.Generator) -> np.ndarray:
    """Return up to `number` distinct passages that are not excluded, in random order."""
    if passages <= 4 * (len(excluded) + number):
        free = np.setdiff1d(np.arange(passages), excluded)
        return rng.choice(free, min(number, len(free)), replace=False)
    seen = set(excluded.tolist())  # most passages are free: draw until there are enough, whatever the pool's size
    fills: list[int] = []
    while len(fills) < number:
        passage = int(rng.integers(passages))
        if passage not in seen:
            seen.add(passage)
            fills.append(passage)
    return np.array(fills, np.int64)
