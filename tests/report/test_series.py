"""Curves, histograms and intervals: what is drawn is what was measured."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybge.evaluation.metric_changes import change, interval
from raybge.report.series import (
    BARS,
    MOST,
    SMALL,
    WIDE,
    Bars,
    bin_width,
    binned,
    curve_of,
    histogram_of,
    smoothed,
    thinned,
)

ANY = st.floats(-1e12, 1e12) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0])


def points(drawing, class_):
    (path,) = [each for each in ET.fromstring(drawing).iter("path") if class_ in each.get("class").split()]
    return [tuple(map(float, point.split())) for point in path.get("d")[1:].split("L")]


def test_a_curve_runs_through_its_points():
    drawn = points(curve_of([(0, 1.0), (50, 3.0), (100, 2.0)], "loss", "step", WIDE), "curve")
    assert [x for x, _ in drawn] == pytest.approx([66, (66 + 1050) / 2, 1050])
    assert drawn[0][1] > drawn[2][1] > drawn[1][1]


@settings(max_examples=60)
@given(st.lists(ANY, max_size=50), st.booleans(), st.booleans())
def test_any_values_have_a_curve_within_its_frame(values, trend, steady):
    drawing = curve_of(list(enumerate(values)), "loss", "step", SMALL, trend=trend, steady=steady)
    assert bool(drawing) == any(map(math.isfinite, values))
    if drawing:
        tree = ET.fromstring(drawing)
        for path in re.findall(r'd="M([^"]*)"', drawing):
            assert "nan" not in path and "inf" not in path
        assert "finite" not in tree.get("aria-label")


def test_many_points_become_their_means():
    many = [(i, float(i % 2)) for i in range(10 * MOST)]
    thin = thinned(many, MOST)
    assert len(thin) == MOST and {value for _, value in thin} == {0.5} and thin[0][0] == 4.5
    assert thinned(many[:MOST], MOST) == many[:MOST]
    assert len(thinned(many[: MOST + 1], MOST)) == MOST // 2 + 1


def test_a_trend_goes_through_the_middle():
    line = [(i, 2.0 * i) for i in range(100)]
    assert smoothed(line) == [pytest.approx(each) for each in line]
    bumpy = smoothed([(i, float(i % 2)) for i in range(100)])
    assert all(0.4 < value < 0.6 for _, value in bumpy[6:-6])


def test_a_steady_value_is_seen_beside_one_that_is_far_off():
    times = [(0, 100.0), *((i, 1 + i % 3 / 10) for i in range(1, 50))]
    plain, steady = (points(curve_of(times, "s", "step", WIDE, steady=s), "curve")[1:] for s in (False, True))
    spread = [max(y for _, y in each) - min(y for _, y in each) for each in (plain, steady)]
    assert spread[1] > 20 * spread[0]


def test_bars_are_shares_of_their_own_kind():
    few, many = Bars("few", binned([0.1, 0.15, 0.3], 0.1), "best"), Bars("many", binned([0.15] * 500, 0.1), "r6")
    drawing = histogram_of([few, many], 0.1, "score", WIDE)
    heights = {name: {y for _, y in points(drawing, name)} for name in ("best", "r6")}
    bottom, top = max(heights["r6"]), min(heights["r6"])
    assert len(heights["r6"]) == 2 and (bottom - sorted(heights["best"])[0]) / (bottom - top) == pytest.approx(
        2 / 3, abs=0.01
    )


def test_bins_are_few_and_hold_all_numbers():
    values = [0.1, 7.0, -3.0, math.nan, math.inf]
    counts = binned(values, bin_width(values))
    assert sum(counts.values()) == 3 and max(counts) - min(counts) < BARS // 2
    assert bin_width([]) > 0 and bin_width([2.0]) > 0


@settings(max_examples=40)
@given(st.dictionaries(st.integers(-5000, 5000), st.integers(1, 9), min_size=1, max_size=40))
def test_any_counts_have_at_most_so_many_bars(counts):
    drawing = histogram_of([Bars("a", counts, "r6")], 0.05, "score", WIDE)
    assert len(points(drawing, "area")) <= 2 * (BARS + 1) + 2


def test_the_interval_is_that_of_queries_drawn_anew():
    """Against the plain bootstrap, and the width that the central limit theorem gives."""
    rng = np.random.default_rng(3)
    before, after = rng.choice([0, 0.5, 1], 300), rng.choice([0, 0.5, 1], 300, p=[0.2, 0.3, 0.5])
    found = change("nDCG@10", before, after)
    gap = after - before
    plain = np.quantile(gap[rng.integers(0, 300, (4000, 300))].mean(axis=1), [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(plain.tolist(), abs=0.015)
    assert found.high - found.low == pytest.approx(2 * 1.96 * gap.std() / math.sqrt(300), rel=0.1)
    assert (found.before, found.after, found.queries) == (before.mean(), after.mean(), 300)
    assert change("nDCG@10", before, after) == found
    fine = rng.random(300)  # of values in thirds of a hundredth two seeds can give the same
    assert change("nDCG@10", before, fine) != change("nDCG@10", before, fine, seed=1)
    assert interval(np.full(7, 0.25)) == (0.25, 0.25)
    paired = change("nDCG@10", before, before + 0.1)
    assert paired.low == pytest.approx(0.1) == paired.high
