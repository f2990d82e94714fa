"""Charts: ticks at round numbers, marks where they belong, texts that cannot break out."""

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from raybge.report.charts import (
    Categories,
    Frame,
    Scale,
    bottom_axis,
    cut,
    element,
    left_axis,
    line,
    mark,
    rounded_out,
    short,
    spread,
    svg,
    told_apart,
    words,
)

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
def test_even_ticks(lo, hi, most, expected):
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
def test_even_ticks_lie_where_they_say(ends, most):
    lo, hi = ends
    assume(hi - lo > 1e-6 * max(abs(lo), abs(hi), 1e-6))
    scale = Scale(lo, hi, 30, 430)
    ticks = scale.ticks(most)
    assert len(ticks) <= most and all(30 <= tick.at <= 430 for tick in ticks)
    assert len({tick.label for tick in ticks}) == len(ticks)
    for tick in ticks:
        value = float(tick.label.replace(",", ""))
        # `short` keeps four digits: as near as they can be.
        assert tick.at == pytest.approx(scale(value), abs=0.5 + 400 * 5e-4 * abs(value) / (hi - lo))


@given(bounds(st.floats(1e-12, 1e12)), st.integers(3, 9))
def test_log_ticks_lie_where_they_say(ends, most):
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
def test_a_scale_ends_where_its_numbers_do(log):
    scale = Scale(1, 100, 300, 20, log=log)
    assert (scale(1), scale(100), scale(-5), scale(1e9)) == (300, 20, 300, 20)
    assert scale(10) == pytest.approx(160 if log else 300 - 280 * 9 / 99)


@given(bounds(NUMBERS), st.integers(3, 9))
def test_rounded_out_ends_at_ticks(ends, most):
    assume(ends[0] == ends[1] or ends[1] - ends[0] > 1e-6 * max(map(abs, ends)) > 1e-200)
    lo, hi = rounded_out(*ends, most)
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
def test_rounded_out(ends, expected):
    assert rounded_out(*ends, 6) == pytest.approx(expected)


def test_categories_share_the_room():
    axis = Categories(("a", "b", ""), 0, 90)
    assert [axis(value) for value in axis.values] == [15, 45, 75]
    assert [tick.label for tick in axis.ticks(9)] == ["a", "b", "(empty)"]
    assert [tick.label for tick in axis.ticks(2)] == ["a", "", "(empty)"]


def test_long_names_are_cut_and_kept_whole_in_the_tooltip():
    (tick,) = Categories(("a rather long name of a thing",), 0, 9).ticks(5, 12)
    assert (tick.label, tick.full) == ("a rather…ing", "a rather long name of a thing")
    axis = Categories(("a rather long name of a thing", "b"), 0, 60)
    drawn = bottom_axis(axis, Frame(0, 0, 60, 50), "flag", 5)
    assert "rotate(" in drawn and "<title>a rather long name of a thing</title>" in drawn


def test_names_that_begin_alike_are_told_apart():
    names = ["", "Represent this sentence for search:", "Represent this question for search:", "cosine"]
    assert told_apart(names, 16) == ["", "…sentence …arch:", "…question …arch:", "cosine"]
    assert told_apart(names[:2], 16) == ["", "Represent …arch:"]
    assert told_apart(["a" * 20 + "b", "a" * 20], 9) == ["…b", "…"]


@given(st.text(max_size=30), st.integers(4, 20))
def test_cut_keeps_both_ends(text, most):
    short_one = cut(text, most)
    assert len(short_one) <= most and (short_one == text or len(text) > most)
    if len(text) > most:
        assert text.startswith(short_one.split("…")[0][:1]) and text.endswith(short_one[-1])


@given(st.lists(st.floats(0, 300), max_size=12))
def test_spread_labels_do_not_overlap(places):
    moved = spread(places, 14, 0, 300)
    by_place = sorted(zip(places, moved, strict=True))
    assert all(-1e-6 <= place <= 300 + 1e-6 for place in moved)
    assert all(b - a >= 14 - 1e-6 for (_, a), (_, b) in pairwise(by_place))


def test_spread_leaves_what_is_apart():
    assert spread([80, 10, 40], 14, 0, 100) == [80, 10, 40]
    assert spread([50, 52], 14, 0, 100) == [50, 64]
    assert spread([99, 100], 14, 0, 100) == [86, 100]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2e-05, "2e-5"),
        (0.123456, "0.1235"),
        (1e-10, "1e-10"),
        (3e5, "3e5"),
        (64.0, "64"),
        (4096, "4096"),
        (True, "True"),
    ],
)
def test_short_values(value, text):
    assert short(value) == text


EVIL = "<script>\"'&</script>"


def test_texts_and_attributes_are_escaped():
    drawn = svg(
        99,
        99,
        EVIL,
        words(1, 2, EVIL, full=EVIL + "x"),
        line([(0, 0), (1, 1)], "curve", EVIL, data_t=EVIL),
        *(mark(shape, 1, 2, EVIL, EVIL) for shape in ("dot", "ring", "cross", "down", "up")),
        bottom_axis(Categories((EVIL,), 0, 9), Frame(0, 0, 9, 9), EVIL, 5),
        left_axis(Scale(0, 1, 9, 0), Frame(0, 0, 9, 9), EVIL, 6),
    )
    assert "<script" not in drawn
    tree = ET.fromstring(drawn)
    assert tree.get("aria-label") == EVIL and tree.findall(".//path")[0].get("data-t") == EVIL
    assert [text for text in tree.itertext() if "script" in text].count(EVIL) >= 8


def test_numbers_are_tenths_of_a_pixel():
    assert (
        element("circle", cx=1 / 3, r=2.0, class_="dot", data_t=None) == '<circle cx="0.3" r="2" class="dot"></circle>'
    )
    assert 'd="M0.3 1L2 3"' in line([(1 / 3, 1), (2, 3)], "curve")
