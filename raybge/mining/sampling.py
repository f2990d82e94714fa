"""Choosing negatives from a row's candidates. Passages are known by number alone.

Letters in array names: C candidates, B banned passages, P positives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

STRATEGIES = ("random", "top")
TRIES = 16  # random passages looked at for each that is missing, where scores decide which may be taken


@dataclass(frozen=True)
class Sampling:
    """What may be a negative, and which of these are taken.

    A passage may be one when its score is at most `max_score`, at least `min_score`, and below that of each positive:
    by `absolute_margin`, and by `relative_margin` of the positive's size (0.05 is the 95% of NV-Retriever,
    https://arxiv.org/abs/2407.15831). None: not asked.

    Args:
        lo, hi: ranks [lo, hi) of the full ranking.
        number: negatives of a row.
        strategy: "random" ones, or those of the "top".
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
        """Whether the positives' scores matter."""
        return self.absolute_margin is not None or self.relative_margin is not None

    @property
    def by_score(self) -> bool:
        """Whether a passage's score matters."""
        return self.by_margin or self.max_score is not None or self.min_score is not None

    def may_be(self, score_C: np.ndarray, positive_P: np.ndarray) -> np.ndarray:
        """True where a passage of that score may be a negative beside those positives."""
        limits = [np.inf if self.max_score is None else self.max_score]
        if self.absolute_margin is not None:
            limits.append(float((positive_P - self.absolute_margin).min()))
        if self.relative_margin is not None:
            limits.append(float((positive_P - self.relative_margin * np.abs(positive_P)).min()))
        least = -np.inf if self.min_score is None else self.min_score
        return (score_C <= min(limits)) & (score_C >= least)

    def describe(self) -> str:
        """For the plan."""
        asked = [
            f"{name} {value:g}"
            for name in ("absolute_margin", "relative_margin", "max_score", "min_score")
            if (value := getattr(self, name)) is not None
        ]
        return (
            f"{self.number} negatives a row, {self.strategy}, from ranks {self.lo} to {self.hi - 1}"
            f"{', '.join(['', *asked])}, seed {self.seed}"
        )


@dataclass(frozen=True)
class Row:
    """What is known of a row.

    Args:
        ids_C, score_C: its candidates of ranks [lo, hi), best first; -1 for none.
        banned_B: passages that are never its negatives; -1 is passed over.
        positive_P: scores of its positives.
        rng: its own.
    """

    ids_C: np.ndarray
    score_C: np.ndarray
    banned_B: np.ndarray
    positive_P: np.ndarray
    rng: np.random.Generator

    def free(self) -> Row:
        """Without the candidates that are banned."""
        good_C = (self.ids_C >= 0) & ~np.isin(self.ids_C, self.banned_B)
        return Row(self.ids_C[good_C], self.score_C[good_C], self.banned_B, self.positive_P, self.rng)


@dataclass(frozen=True)
class Drawn:
    """A row's negatives, and how many of them, the last ones, are random passages."""

    ids: np.ndarray
    fills: int


def sample(
    rows: Sequence[Row], sampling: Sampling, passages: int, score: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> list[Drawn]:
    """Distinct negatives of each row, none of them banned.

    Where the candidates do not suffice, the rest is drawn from all passages 0 to passages-1; fewer come back where
    those do not suffice either.

    Args:
        score: gives the scores of passages for rows, score(row_N, ids_N), rows by their place here; called at most
            once, and only where scores decide.
    """
    chosen = [_choose(row, sampling) for row in rows]
    missing = [sampling.number - len(ids) for ids in chosen]
    others = [
        _others(np.union1d(ids, row.banned_B[row.banned_B >= 0]), want * _tries(sampling), passages, row.rng)
        if want
        else np.zeros(0, np.int64)
        for row, ids, want in zip(rows, chosen, missing, strict=True)
    ]
    if sampling.by_score and any(map(len, others)):
        counts = [len(ids) for ids in others]
        scores = score(np.repeat(np.arange(len(rows)), counts), np.concatenate(others))
        parts = np.split(scores, np.cumsum(counts)[:-1])
        others = [
            ids[sampling.may_be(part, row.positive_P)] for ids, part, row in zip(others, parts, rows, strict=True)
        ]
    return [
        Drawn(np.concatenate([ids, more[:want]]).astype(np.int64), min(want, len(more)))
        for ids, more, want in zip(chosen, others, missing, strict=True)
    ]


def _tries(sampling: Sampling) -> int:
    return TRIES if sampling.by_score else 1


def _choose(row: Row, sampling: Sampling) -> np.ndarray:
    row = row.free()
    ids_C, score_C = row.ids_C, row.score_C
    if sampling.by_score:
        good_C = sampling.may_be(score_C, row.positive_P)
        ids_C, score_C = ids_C[good_C], score_C[good_C]
    if sampling.strategy == "top":
        return ids_C[np.lexsort((ids_C, -score_C))[: sampling.number]]
    # sorted, so that candidates that change places among themselves change nothing
    ids_C = np.sort(ids_C)
    if len(ids_C) >= sampling.number:
        return row.rng.choice(ids_C, sampling.number, replace=False)
    return row.rng.permutation(ids_C)


def _others(taken: np.ndarray, number: int, passages: int, rng: np.random.Generator) -> np.ndarray:
    """Up to `number` passages that are not taken, in random order."""
    if passages <= 4 * (len(taken) + number):
        free = np.setdiff1d(np.arange(passages), taken)
        return rng.choice(free, min(number, len(free)), replace=False)
    seen = set(taken.tolist())  # most passages are free: draw until there are enough, whatever the pool's size
    fills: list[int] = []
    while len(fills) < number:
        one = int(rng.integers(passages))
        if one not in seen:
            seen.add(one)
            fills.append(one)
    return np.array(fills, np.int64)
