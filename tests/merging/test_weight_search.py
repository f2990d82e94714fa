"""The search for merge weights on functions with a known optimum."""

import itertools

import numpy as np
import pytest

from raybge.merging.weight_search import (
    MergeCandidate,
    best_candidate,
    general_threshold,
    initial_weights,
    search_weights,
    shift_weight,
)


def peak(optimum):
    """A target metric that decreases with the distance from the weights `optimum`."""
    return lambda weights: 0.8 - sum((a - b) ** 2 for a, b in zip(weights, optimum, strict=True))


def run(target, general, models, most=30, floor=0.98):
    evaluated = []

    def evaluate(weights):
        evaluated.append(weights)
        return MergeCandidate(weights, target(weights), general(weights) if general else None)

    candidates = [*search_weights(evaluate, models, most, floor)]
    assert [each.weights for each in candidates] == evaluated and len({*evaluated}) == len(evaluated) <= most
    for weights in evaluated:
        assert min(weights) >= 0 and sum(weights) == pytest.approx(1, abs=1e-5)
    return candidates


def grid(models, steps=200):
    """Weights everywhere on the simplex."""
    for parts in itertools.product(range(steps + 1), repeat=models - 1):
        if sum(parts) <= steps:
            yield (*(part / steps for part in parts), (steps - sum(parts)) / steps)


@pytest.mark.parametrize("optimum", [(0.37, 0.63), (1.0, 0.0), (0.5, 0.2, 0.3), (0.0, 0.9, 0.1), (0.1, 0.4, 0.2, 0.3)])
def test_search_reaches_the_optimum(optimum):
    candidates = run(peak(optimum), None, len(optimum), most=60)
    assert best_candidate(candidates, 0.98).target > 0.8 - 0.002


@pytest.mark.parametrize("optimum", [(0.9, 0.1), (0.7, 0.2, 0.1)])
def test_search_under_a_floor_is_close_to_a_dense_grid(optimum):
    """The general set favors the last model, so that the best feasible candidate is at the floor."""
    target, general = peak(optimum), lambda weights: 0.5 + 0.4 * weights[-1]
    candidates = run(target, general, len(optimum), most=40, floor=0.79)
    best, threshold = best_candidate(candidates, 0.79), general_threshold(candidates, 0.79)
    assert threshold == pytest.approx(0.79 * 0.9) and best.general >= threshold
    expected = max(target(weights) for weights in grid(len(optimum)) if general(weights) >= threshold)
    unconstrained = max(each.target for each in candidates)
    assert expected - 0.04 < best.target <= expected + 0.01 < unconstrained


def test_two_models_start_with_eleven_tenths():
    np.testing.assert_allclose(initial_weights(2), [(i / 10, 1 - i / 10) for i in range(10, -1, -1)])
    candidates = run(peak((0.62, 0.38)), None, 2)
    assert [each.weights for each in candidates[:11]] == initial_weights(2) and 11 < len(candidates) < 20
    assert best_candidate(candidates, 1).weights[0] == pytest.approx(0.625, abs=0.03)


def test_max_evaluations_is_never_exceeded():
    assert len(run(peak((0.2, 0.3, 0.5)), None, 3, most=5)) == 5
    assert len(run(peak((0.3,) * 2 + (0.4,)), None, 3, most=1)) == 1
    assert len(run(lambda weights: 0.5, None, 4, most=1000)) < 60  # no move improves: the search ends


def test_first_of_equal_candidates_is_best():
    candidates = [
        MergeCandidate((1.0, 0.0), 0.5, 0.9),
        MergeCandidate((0.5, 0.5), 0.5, 0.9),
        MergeCandidate((0.0, 1.0), 0.7, 0.1),
    ]
    assert best_candidate(candidates, 0.95) is candidates[0] and best_candidate(candidates, 0.1) is candidates[2]
    assert general_threshold([MergeCandidate((1.0, 0.0), 0.5)], 0.9) == -np.inf


def test_shift_is_limited_by_the_source_weight():
    assert shift_weight((0.5, 0.3, 0.2), 0, 2, 0.25) == pytest.approx((0.25, 0.3, 0.45))
    assert shift_weight((0.5, 0.3, 0.2), 2, 1, 0.25) == pytest.approx((0.5, 0.5, 0.0))
    assert shift_weight((1.0, 0.0), 1, 0, 0.1) == (1.0, 0.0)
