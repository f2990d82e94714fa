"""Curves, histograms and intervals show the measured values."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybge.evaluation.metric_changes import MetricChange
from raybge.evaluation.significance import interval
from raybge.report.series import (
    MAX_BARS,
    MAX_HOVER,
    MAX_POINTS,
    SMALL,
    WIDE,
    Bars,
    bin_width,
    binned,
    bucket_means,
    draw_curve,
    draw_histogram,
    smoothed,
)

ANY = st.floats(-1e12, 1e12) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0])


def points(drawing, class_):
    (path,) = [each for each in ET.fromstring(drawing).iter("path") if class_ in each.get("class").split()]
    return [tuple(map(float, point.split())) for point in path.get("d")[1:].split("L")]


def test_curve_runs_through_its_points():
    drawn = points(draw_curve([(0, 1.0), (50, 3.0), (100, 2.0)], "loss", "step", WIDE), "curve")
    assert [x for x, _ in drawn] == pytest.approx([66, (66 + 1050) / 2, 1050])
    assert drawn[0][1] > drawn[2][1] > drawn[1][1]


@settings(max_examples=60)
@given(st.lists(ANY, max_size=50), st.booleans(), st.booleans())
def test_curve_of_any_values_stays_in_its_frame(values, trend, steady):
    drawing = draw_curve(list(enumerate(values)), "loss", "step", SMALL, trend=trend, steady=steady)
    assert bool(drawing) == any(map(math.isfinite, values))
    if drawing:
        tree = ET.fromstring(drawing)
        for path in re.findall(r'd="M([^"]*)"', drawing):
            assert "nan" not in path and "inf" not in path
        assert "finite" not in tree.get("aria-label")


def test_many_points_are_averaged():
    many = [(i, float(i % 2)) for i in range(10 * MAX_POINTS)]
    thin = bucket_means(many, MAX_POINTS)
    assert len(thin) == MAX_POINTS and {value for _, value in thin} == {0.5} and thin[0][0] == 4.5
    assert bucket_means(many[:MAX_POINTS], MAX_POINTS) == many[:MAX_POINTS]
    assert len(bucket_means(many[: MAX_POINTS + 1], MAX_POINTS)) == MAX_POINTS // 2 + 1


def tooltips(count):
    drawing = draw_curve([(i, i / 8) for i in range(count)], "loss", "step", WIDE)
    titles = [each.text for each in ET.fromstring(drawing).iter("title")]
    return [title for title in titles if title.startswith("step ")]


def test_points_of_a_curve_have_their_values_as_tooltips():
    assert tooltips(3) == ["step 0: loss 0", "step 1: loss 0.125", "step 2: loss 0.25"]
    assert len(tooltips(60)) == 60 and 60 < len(tooltips(1000)) <= MAX_HOVER  # without them a page would grow
    assert tooltips(1000)[1].startswith("step 1")


def test_trend_is_the_moving_mean():
    line = [(i, 2.0 * i) for i in range(100)]
    assert smoothed(line) == [pytest.approx(each) for each in line]
    bumpy = smoothed([(i, float(i % 2)) for i in range(100)])
    assert all(0.4 < value < 0.6 for _, value in bumpy[6:-6])


def test_outlier_does_not_flatten_a_steady_value():
    times = [(0, 100.0), *((i, 1 + i % 3 / 10) for i in range(1, 50))]
    plain, steady = (points(draw_curve(times, "s", "step", WIDE, steady=s), "curve")[1:] for s in (False, True))
    spread = [max(y for _, y in each) - min(y for _, y in each) for each in (plain, steady)]
    assert spread[1] > 20 * spread[0]


def test_bars_are_shares_of_their_group():
    few, many = Bars("few", binned([0.1, 0.15, 0.3], 0.1), "best"), Bars("many", binned([0.15] * 500, 0.1), "r6")
    drawing = draw_histogram([few, many], 0.1, "score", WIDE)
    heights = {name: {y for _, y in points(drawing, name)} for name in ("best", "r6")}
    bottom, top = max(heights["r6"]), min(heights["r6"])
    assert len(heights["r6"]) == 2 and (bottom - sorted(heights["best"])[0]) / (bottom - top) == pytest.approx(
        2 / 3, abs=0.01
    )


def test_bins_are_few_and_contain_all_values():
    values = [0.1, 7.0, -3.0, math.nan, math.inf]
    counts = binned(values, bin_width(values))
    assert sum(counts.values()) == 3 and max(counts) - min(counts) < MAX_BARS // 2
    assert bin_width([]) > 0 and bin_width([2.0]) > 0


@settings(max_examples=40)
@given(st.dictionaries(st.integers(-5000, 5000), st.integers(1, 9), min_size=1, max_size=40))
def test_number_of_bars_is_bounded(counts):
    drawing = draw_histogram([Bars("a", counts, "r6")], 0.05, "score", WIDE)
    assert len(points(drawing, "area")) <= 2 * (MAX_BARS + 1) + 2


def test_interval_is_that_of_resampled_queries():
    """Against the plain bootstrap, and with the width of the central limit theorem."""
    rng = np.random.default_rng(3)
    before, after = rng.choice([0, 0.5, 1], 300), rng.choice([0, 0.5, 1], 300, p=[0.2, 0.3, 0.5])
    change = MetricChange.from_queries("nDCG@10", before, after)
    gap = after - before
    plain = np.quantile(gap[rng.integers(0, 300, (4000, 300))].mean(axis=1), [0.025, 0.975])
    assert (change.low, change.high) == pytest.approx(plain.tolist(), abs=0.015)
    assert change.high - change.low == pytest.approx(2 * 1.96 * gap.std() / math.sqrt(300), rel=0.1)
    assert (change.before, change.after, change.queries) == (before.mean(), after.mean(), 300)
    assert MetricChange.from_queries("nDCG@10", before, after) == change
    fine = rng.random(300)  # with few distinct values, two seeds may agree
    assert MetricChange.from_queries("nDCG@10", before, fine) != MetricChange.from_queries(
        "nDCG@10", before, fine, seed=1
    )
    assert interval(np.full(7, 0.25)) == (0.25, 0.25)
    paired = MetricChange.from_queries("nDCG@10", before, before + 0.1)
    assert paired.low == pytest.approx(0.1) == paired.high
