"""Scales: ticks at round numbers, values at their positions."""

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from raybge.report.scales import Categories, Scale, spread_labels, tick_range

NUMBERS = st.floats(-1e12, 1e12)


def bounds(numbers):
    return st.lists(numbers, min_size=2, max_size=2).map(sorted)


def labels(scale, most):
    return [tick.label for tick in scale.ticks(most) if tick.label]


@pytest.mark.parametrize(
    ("lo", "hi", "most", "expected"),
    [
        (0, 1, 6, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.01, 0.1, 6, ["0.02", "0.04", "0.06", "0.08", "0.10"]),
        (0.61, 0.64, 5, ["0.61", "0.62", "0.63", "0.64"]),
        (0, 12_000, 4, ["0", "5,000", "10,000"]),
        (-3, 3, 4, ["-2", "0", "2"]),
        (1e-6, 9e-6, 5, ["2e-6", "4e-6", "6e-6", "8e-6"]),
    ],
)
def test_linear_ticks(lo, hi, most, expected):
    assert labels(Scale(lo, hi, 0, 100), most) == expected


@pytest.mark.parametrize(
    ("lo", "hi", "expected", "small"),
    [
        (1e-6, 1e-3, ["1e-6", "1e-5", "0.0001", "0.001"], 24),
        (1e-6, 1e-4, ["1e-6", "1e-5", "0.0001"], 16),
        (1e-5, 9e-5, ["1e-5", "2e-5", "5e-5"], 6),
        (1e-5, 1.3e-5, ["1e-5", "1.1e-5", "1.2e-5", "1.3e-5"], 0),
        (1e-12, 1, ["1e-12", "1e-9", "1e-6", "0.001", "1"], 104),
    ],
)
def test_log_ticks(lo, hi, expected, small):
    scale = Scale(lo, hi, 0, 100, log=True)
    assert labels(scale, 6) == expected
    assert sum(not tick.label for tick in scale.ticks(6)) == small


def test_whole_ticks():
    assert labels(Scale(2, 4, 0, 100, whole=True), 8) == ["2", "3", "4"]
    assert labels(Scale(1, 256, 0, 100, log=True, whole=True), 6) == ["1", "10", "100"]


@given(bounds(NUMBERS), st.integers(2, 9))
def test_linear_ticks_are_at_their_values(ends, most):
    lo, hi = ends
    assume(hi - lo > 1e-6 * max(abs(lo), abs(hi), 1e-6))
    scale = Scale(lo, hi, 30, 430)
    ticks = scale.ticks(most)
    assert len(ticks) <= most and all(30 <= tick.at <= 430 for tick in ticks)
    assert len({tick.label for tick in ticks}) == len(ticks)
    for tick in ticks:
        value = float(tick.label.replace(",", ""))
        # `format_value` keeps four digits: that is the precision.
        assert tick.at == pytest.approx(scale(value), abs=0.5 + 400 * 5e-4 * abs(value) / (hi - lo))


@given(bounds(st.floats(1e-12, 1e12)), st.integers(3, 9))
def test_log_ticks_are_at_their_values(ends, most):
    lo, hi = ends
    assume(hi > 1.01 * lo)
    scale = Scale(lo, hi, 400, 0, log=True)
    ticks = scale.ticks(most)
    assert sum(bool(tick.label) for tick in ticks) <= most + 1
    for tick in ticks:
        assert 0 <= tick.at <= 400
        if tick.label:
            value = float(tick.label.replace(",", ""))
            assert tick.at == pytest.approx(scale(value), abs=0.5 + 400 * 1e-3 / math.log(hi / lo))


@pytest.mark.parametrize("log", [False, True])
def test_scale_maps_its_range_to_its_ends(log):
    scale = Scale(1, 100, 300, 20, log=log)
    assert (scale(1), scale(100), scale(-5), scale(1e9)) == (300, 20, 300, 20)
    assert scale(10) == pytest.approx(160 if log else 300 - 280 * 9 / 99)


@given(bounds(NUMBERS), st.integers(3, 9))
def test_tick_range_ends_at_ticks(ends, most):
    assume(ends[0] == ends[1] or ends[1] - ends[0] > 1e-6 * max(map(abs, ends)) > 1e-200)
    lo, hi = tick_range(*ends, most)
    near = 1e-8 * max(abs(lo), abs(hi))
    assert lo < hi and lo <= ends[0] + near and hi >= ends[1] - near
    assert hi - lo <= 5 * max(ends[1] - ends[0], 0.1 * abs(ends[0]), 1)
    ticks = Scale(lo, hi, 0, 100).ticks(most)
    assert 2 <= len(ticks) <= most
    assert (ticks[0].at, ticks[-1].at) == (pytest.approx(0, abs=1e-4), pytest.approx(100, abs=1e-4))


@pytest.mark.parametrize(
    ("ends", "expected"),
    [((0.412, 0.5368), (0.40, 0.55)), ((0.5, 0.5), (0.46, 0.54)), ((0, 0), (-1, 1)), ((0, 1), (0, 1))],
)
def test_tick_range(ends, expected):
    assert tick_range(*ends, 6) == pytest.approx(expected)


def test_categories_share_the_width():
    axis = Categories(("a", "b", ""), 0, 90)
    assert [axis(value) for value in axis.values] == [15, 45, 75]
    assert [tick.label for tick in axis.ticks(9)] == ["a", "b", "(empty)"]
    assert [tick.label for tick in axis.ticks(2)] == ["a", "", "(empty)"]


@given(st.lists(st.floats(0, 300), max_size=12))
def test_spread_labels_do_not_overlap(places):
    moved = spread_labels(places, 14, 0, 300)
    by_place = sorted(zip(places, moved, strict=True))
    assert all(-1e-6 <= place <= 300 + 1e-6 for place in moved)
    assert all(b - a >= 14 - 1e-6 for (_, a), (_, b) in pairwise(by_place))


def test_spread_labels_keeps_distant_positions():
    assert spread_labels([80, 10, 40], 14, 0, 100) == [80, 10, 40]
    assert spread_labels([50, 52], 14, 0, 100) == [50, 64]
    assert spread_labels([99, 100], 14, 0, 100) == [86, 100]
