"""Drawing negatives from a row's candidates. Passages are known by number alone.

Letters in array names: C candidates, B banned passages.
"""

from __future__ import annotations

import numpy as np


def draw(
    candidates_C: np.ndarray, banned_B: np.ndarray, number: int, passages: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """`number` distinct passages from the candidates, none of them banned, in random order.

    Where the candidates do not suffice, the rest is drawn from all passages 0 to passages-1 that are neither
    banned nor taken; fewer come back where those do not suffice either.

    Returns:
        The drawn ids, and how many of them are such fills.
    """
    # sorted, so that candidates that change places among themselves change nothing
    free = np.setdiff1d(candidates_C[candidates_C >= 0], banned_B)
    if len(free) >= number:
        return rng.choice(free, number, replace=False), 0
    chosen = rng.permutation(free)
    taken = np.union1d(chosen, banned_B[banned_B >= 0])
    fills = _others(taken, number - len(chosen), passages, rng)
    return np.concatenate([chosen, fills]).astype(np.int64), len(fills)


def _others(taken: np.ndarray, number: int, passages: int, rng: np.random.Generator) -> np.ndarray:
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
