"""Derivative-free search for merge weights: maximize a target metric subject to a floor on a second one.

No weight is negative, and their sum is 1. Each source model alone and the uniform average
are evaluated first; for two models, all eleven multiples of a tenth. Then a pattern search moves a step of weight from
each model to each other, starting from the best candidate so far, and halves the step when no move improves it. Moves
are pairwise, not one model against all others: at the floor, weight must be taken from the right model.
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
class MergeCandidate:
    """Merge weights with their metric on the target set and, None without a second set, on the general set."""

    weights: Weights
    target: float
    general: float | None = None


def search_weights(
    evaluate: Callable[[Weights], MergeCandidate], models: int, max_evaluations: int, floor: float
) -> Iterator[MergeCandidate]:
    """Yield each candidate once it is evaluated; the search depends on nothing but the metrics.

    Args:
        evaluate: evaluates the model merged with these weights; called once for each distinct value.
        models: number of source models.
        max_evaluations: most candidates.
        floor: as for `best_candidate`, which chooses among the results.

    Yields:
        Candidates in the order of their evaluation.
    """
    evaluated: dict[Weights, MergeCandidate] = {}

    def attempt(weights: Weights) -> Iterator[MergeCandidate]:
        if weights not in evaluated and len(evaluated) < max_evaluations:
            evaluated[weights] = evaluate(weights)
            yield evaluated[weights]

    for weights in initial_weights(models):
        yield from attempt(weights)
    step = 1 / TENTHS / 2 if models == 2 else FIRST_STEP
    while step > LAST_STEP and len(evaluated) < max_evaluations:
        before = best_candidate([*evaluated.values()], floor)
        for source, destination in itertools.permutations(range(models), 2):
            best = best_candidate([*evaluated.values()], floor)
            yield from attempt(shift_weight(best.weights, source, destination, step))
        if best_candidate([*evaluated.values()], floor) is before:
            step /= 2


def best_candidate(candidates: Sequence[MergeCandidate], floor: float) -> MergeCandidate:
    """Return the candidate with the highest target metric that reaches `general_threshold`; the first of equal ones."""
    threshold = general_threshold(candidates, floor)
    feasible = [each for each in candidates if each.general is None or each.general >= threshold]
    return max(feasible, key=lambda each: each.target)


def general_threshold(candidates: Sequence[MergeCandidate], floor: float) -> float:
    """Return `floor` times the best single model's general metric; minus infinity without a general set."""
    single = [each.general for each in candidates if max(each.weights) == 1 and each.general is not None]
    return floor * max(single) if single else -math.inf


def initial_weights(models: int) -> list[Weights]:
    """Return the merge weights that are evaluated first."""
    if models == 2:
        return [(i / TENTHS, (TENTHS - i) / TENTHS) for i in range(TENTHS, -1, -1)]
    single = [tuple(float(i == j) for j in range(models)) for i in range(models)]
    return [*single, (1 / models,) * models]


def shift_weight(weights: Weights, source: int, destination: int, step: float) -> Weights:
    """Move `step` of weight from one model to another, or all that the first one has.

    The result is rounded, so that equal weights compare equal.
    """
    shifted = list(weights)
    step = min(step, weights[source])
    shifted[source] -= step
    shifted[destination] += step
    return tuple(round(weight, 6) for weight in shifted)
