"""The weights of a mixture that do best on a target, under a floor on something else: a search that measures little.

Weights lie on a simplex: none is below 0, their sum is 1. Each model alone and the even mixture are measured first, of
two models all eleven steps of a tenth. Then, from the best so far, a step of weight is moved from each model to each
other; where none of it helps, the step is halved. Pairs, and not one model against all others: on the floor, what one
gains must be taken from the right one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Weights = tuple[float, ...]
TENTHS = 10
FIRST_STEP, LAST_STEP = 0.25, 0.02


@dataclass(frozen=True)
class Tasted:
    """A mixture and what it came to; `general` is None where there is no second set."""

    weights: Weights
    target: float
    general: float | None = None


def search(measure: Callable[[Weights], Tasted], models: int, most: int, floor: float) -> Iterator[Tasted]:
    """Each mixture that is measured, at most `most` of them; `best` picks from them. Equal measures, equal searches.

    Args:
        measure: measures the mixture of these weights; it is asked once for each.
        floor: as in `best`.
    """
    known: dict[Weights, Tasted] = {}

    def taste(weights: Weights) -> Iterator[Tasted]:
        if weights not in known and len(known) < most:
            known[weights] = measure(weights)
            yield known[weights]

    for weights in starts(models):
        yield from taste(weights)
    step = 1 / TENTHS / 2 if models == 2 else FIRST_STEP
    while step > LAST_STEP and len(known) < most:
        before = best([*known.values()], floor)
        for giver, taker in itertools.permutations(range(models), 2):
            yield from taste(moved(best([*known.values()], floor).weights, giver, taker, step))
        if best([*known.values()], floor) is before:
            step /= 2


def best(tasted: Sequence[Tasted], floor: float) -> Tasted:
    """The mixture with the highest target of those whose general value is at least `floor` times that of the best
    single model; the first of equals.
    """
    least = lowest(tasted, floor)
    passing = [each for each in tasted if each.general is None or each.general >= least]
    return max(passing, key=lambda each: each.target)


def lowest(tasted: Sequence[Tasted], floor: float) -> float:
    """The least general value that passes; without a second set, anything does."""
    alone = [each.general for each in tasted if max(each.weights) == 1 and each.general is not None]
    return floor * max(alone) if alone else -math.inf


def starts(models: int) -> list[Weights]:
    """What is measured first."""
    if models == 2:
        return [(i / TENTHS, (TENTHS - i) / TENTHS) for i in range(TENTHS, -1, -1)]
    alone = [tuple(float(i == j) for j in range(models)) for i in range(models)]
    return [*alone, (1 / models,) * models]


def moved(weights: Weights, giver: int, taker: int, step: float) -> Weights:
    """The weights with a step moved from one model to another, or as much as there is; rounded, so that what is the
    same is seen to be.
    """
    found = list(weights)
    step = min(step, weights[giver])
    found[giver] -= step
    found[taker] += step
    return tuple(round(weight, 6) for weight in found)
