"""The search for weights, on functions whose best is known."""

import itertools

import numpy as np
import pytest

from raybge.merging.coefficient_search import Tasted, best, lowest, moved, search, starts


def peak(place):
    """A target that falls off from the weights `place`."""
    return lambda weights: 0.8 - sum((a - b) ** 2 for a, b in zip(weights, place, strict=True))


def run(target, general, models, most=30, floor=0.98):
    measured = []

    def measure(weights):
        measured.append(weights)
        return Tasted(weights, target(weights), general(weights) if general else None)

    tasted = [*search(measure, models, most, floor)]
    assert [each.weights for each in tasted] == measured and len({*measured}) == len(measured) <= most
    for weights in measured:
        assert min(weights) >= 0 and sum(weights) == pytest.approx(1, abs=1e-5)
    return tasted


def grid(models, steps=200):
    """Weights everywhere on the simplex."""
    for parts in itertools.product(range(steps + 1), repeat=models - 1):
        if sum(parts) <= steps:
            yield (*(part / steps for part in parts), (steps - sum(parts)) / steps)


@pytest.mark.parametrize("place", [(0.37, 0.63), (1.0, 0.0), (0.5, 0.2, 0.3), (0.0, 0.9, 0.1), (0.1, 0.4, 0.2, 0.3)])
def test_the_peak_is_found(place):
    tasted = run(peak(place), None, len(place), most=60)
    assert best(tasted, 0.98).target > 0.8 - 0.002


@pytest.mark.parametrize("place", [(0.9, 0.1), (0.7, 0.2, 0.1)])
def test_the_floor_is_kept_at_little_loss(place):
    """The second set wants the last model: the best that passes lies on the floor, and a dense grid says where."""
    target, general = peak(place), lambda weights: 0.5 + 0.4 * weights[-1]
    tasted = run(target, general, len(place), most=40, floor=0.79)
    found, least = best(tasted, 0.79), lowest(tasted, 0.79)
    assert least == pytest.approx(0.79 * 0.9) and found.general >= least
    right = max(target(weights) for weights in grid(len(place)) if general(weights) >= least)
    free = max(each.target for each in tasted)
    assert right - 0.04 < found.target <= right + 0.01 < free


def test_two_models_give_a_curve_of_eleven_mixtures():
    np.testing.assert_allclose(starts(2), [(i / 10, 1 - i / 10) for i in range(10, -1, -1)])
    tasted = run(peak((0.62, 0.38)), None, 2)
    assert [each.weights for each in tasted[:11]] == starts(2) and 11 < len(tasted) < 20
    assert best(tasted, 1).weights[0] == pytest.approx(0.625, abs=0.03)


def test_few_evaluations_are_enough_and_never_exceeded():
    assert len(run(peak((0.2, 0.3, 0.5)), None, 3, most=5)) == 5
    assert len(run(peak((0.3,) * 2 + (0.4,)), None, 3, most=1)) == 1
    assert len(run(lambda weights: 0.5, None, 4, most=1000)) < 60  # nothing helps: it ends by itself


def test_without_a_better_mixture_the_first_is_taken():
    tasted = [Tasted((1.0, 0.0), 0.5, 0.9), Tasted((0.5, 0.5), 0.5, 0.9), Tasted((0.0, 1.0), 0.7, 0.1)]
    assert best(tasted, 0.95) is tasted[0] and best(tasted, 0.1) is tasted[2]
    assert lowest([Tasted((1.0, 0.0), 0.5)], 0.9) == -np.inf


def test_no_more_is_moved_than_there_is():
    assert moved((0.5, 0.3, 0.2), 0, 2, 0.25) == pytest.approx((0.25, 0.3, 0.45))
    assert moved((0.5, 0.3, 0.2), 2, 1, 0.25) == pytest.approx((0.5, 0.5, 0.0))
    assert moved((1.0, 0.0), 1, 0, 0.1) == (1.0, 0.0)
