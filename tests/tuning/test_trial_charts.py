"""Charts of a search: marks at their positions, for any outcome of the trials."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Page
from searches import METRIC, SIX, numbers_of, of_class, search, trial, view

from raybge.tuning.page import NARROW, WIDE, html
from raybge.tuning.records import STATUSES, Trial
from raybge.tuning.search_space import Domain
from raybge.tuning.trial_charts import TrialView, focus, learning_curves, parallel_coordinates, scatter, wrap_name


def test_curves_show_measured_trials_and_their_status():
    drawing = ET.fromstring(learning_curves(view(SIX), 1000))
    assert sorted(numbers_of(drawing, "curve")) == [0, 1, 2, 4, 5]
    assert numbers_of(drawing, "curve")[-1] == 1 and numbers_of(drawing, "curve", "best") == [1]
    assert numbers_of(drawing, "ring") == [5, 2]  # worst first
    labels = {text.text for text in of_class(drawing, "end")}
    assert labels == {"trial 0", "trial 1: 0.6500", "trial 2", "trial 4", "trial 5"}


def test_curve_is_at_its_values():
    drawing = ET.fromstring(learning_curves(view([trial(0, 0.6, begin=0.4)]), 1000))
    (path,) = of_class(drawing, "curve")
    (x0, y0), (x1, y1), (x2, y2) = points(path)
    # The axes are round numbers around 0 to 20 and 0.4 to 0.6: the frame itself.
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert (x0, x2) == (62, 1000 - 20 - 8 * len("trial 0: 0.6000")) and (y0, y2) == (420 - 52, 40)


def points(path):
    return [tuple(map(float, point.split())) for point in path.get("d")[1:].split("L")]


def test_of_many_curves_only_the_best_is_labeled():
    drawing = ET.fromstring(learning_curves(view([trial(i, 0.5 + i / 1000) for i in range(50)]), 1000))
    assert [text.text for text in of_class(drawing, "end")] == ["trial 49: 0.5490"]
    shades = [each.get("class").split()[1] for each in of_class(drawing, "curve", "some")]
    assert shades[0] == "r0" and shades[-1] == "best" and len(set(shades)) == 10


def test_curves_omit_values_that_are_not_finite():
    odd = Trial(0, {}, "failed", [(0, 0.5), (1, math.nan), (2, math.inf), (3, 0.6)], {METRIC: 0.6}, 1.0)
    (path,) = of_class(ET.fromstring(learning_curves(view([odd]), 1000)), "curve")
    assert len(points(path)) == 2
    assert numbers_of(ET.fromstring(learning_curves(view([odd]), 1000)), "cross") == [0]


def test_colors_follow_the_rank():
    def shades(scores, mode="max"):
        trials = [trial(i, score) for i, score in enumerate(scores)]
        return [view(trials, mode).shade(t) for t in trials]

    assert shades([0.1, 0.61, 0.62, 0.63]) == ["r0", "r3", "r5", "best"]
    assert shades([0.1, 0.61, 0.62, 0.63], "min") == ["best", "r5", "r3", "r0"]
    assert shades([0.5, 0.5, 0.5]) == ["best", "r8", "r8"]
    assert shades([None, 0.5]) == ["none", "best"]


def test_legend_names_what_occurs():
    page = Page(html(search(SIX))).text
    assert "best" in page and "worst to best, by rank" in page and "stopped early, running" in page
    one = html(search([trial(0, 0.5)]))
    assert (
        "by rank" not in one
        and "stopped early</li>" not in one
        and "running</li>" not in one
        and ">finished</li>" in one
    )


def test_small_screens_have_their_own_charts():
    page = html(search(SIX))
    boxes = [attributes.get("viewbox") for tag, attributes in Page(page).elements if tag == "svg"]
    assert sum(box is not None and box.startswith(f"0 0 {WIDE} ") for box in boxes) == 2
    assert sum(box is not None and box.startswith(f"0 0 {NARROW} ") for box in boxes) == 2
    assert page.count('class="chart wide"') == page.count('class="chart narrow"') == 2


def test_focus_omits_outliers():
    good = [0.60, 0.61, 0.62, 0.63, 0.64]
    lo, hi = focus([0.01, *good], "max")
    assert 0.3 < lo < 0.6 and hi == 0.64
    assert focus([*good, 9.0], "min") == (0.60, pytest.approx(0.7, abs=0.1))
    assert focus([*good, 9.0], "max") == (0.60, 9.0)  # the best is never omitted
    assert focus(good, "max") == (0.60, 0.64)
    assert focus([0.1, 0.9], "max") == (0.1, 0.9)
    assert focus([0.5] * 9 + [0.1], "max") == (0.1, 0.5)


def test_outlier_is_marked_at_the_edge():
    with_outlier = view([trial(i, 0.6 + i / 100) for i in range(9)] + [trial(9, 0.01)])
    drawing = ET.fromstring(scatter(with_outlier, "learning_rate"))
    (low,) = [each for each in of_class(drawing, "dot") if each.tag == "path"]
    assert low.get("data-t") == "9"


def test_parallel_lines_cross_every_axis_and_end_at_the_metric():
    drawing = ET.fromstring(parallel_coordinates(view(SIX), 1000))
    lines = {int(each.get("data-t")): points(each) for each in of_class(drawing, "path")}
    assert set(lines) == {0, 1, 2, 3, 4, 5}
    assert len(lines[3]) == 2 and all(len(lines[number]) == 3 for number in (0, 1, 2, 4, 5))
    assert list(lines)[-1] == 1
    heights = {number: line[-1][1] for number, line in lines.items() if number != 3}
    assert sorted(heights, key=heights.get) == [1, 0, 4, 2, 5]  # best on top
    assert lines[1][0][1] < lines[0][0][1]  # 5e-5 above 2e-5
    names = [text.text for text in of_class(drawing, "name")]
    assert names == ["learning_rate", "lr_scheduler_type", METRIC]


def test_parallel_coordinates_widen_with_the_flags():
    space = {f"flag_{i}": Domain("uniform", (0.0, 1.0)) for i in range(12)}
    one = Trial(0, dict.fromkeys(space, 0.5), "finished", [(1, 0.5)], {METRIC: 0.5}, 1.0)
    drawing = ET.fromstring(parallel_coordinates(view([one], space=space), NARROW))
    xs = [x for x, _ in points(of_class(drawing, "path")[0])]
    assert len(xs) == 13 and min(b - a for a, b in pairwise(xs)) >= 80


def test_scatter_positions_crosses_and_circled_best():
    drawing = ET.fromstring(scatter(view(SIX), "learning_rate"))
    dots = {int(each.get("data-t")): float(each.get("cx")) for each in drawing.iter("circle") if each.get("data-t")}
    assert set(dots) == {0, 1, 2, 4, 5} and dots[0] == dots[2] < dots[1]
    assert numbers_of(drawing, "cross") == [3]
    assert len(of_class(drawing, "halo", "ring")) == 1
    middle = ET.fromstring(scatter(view(SIX), "lr_scheduler_type"))
    assert [each.find("title").text for each in of_class(middle, "middle")] == ["median 0.5750"]


def test_log_domain_has_a_log_axis():
    trials = [trial(i, 0.5 + i / 10, learning_rate=10.0 ** (i - 6)) for i in range(3)]
    for function, even in (("loguniform", True), ("uniform", False)):
        space = {"learning_rate": Domain(function, (1e-6, 1e-4))}
        drawing = ET.fromstring(scatter(view(trials, space=space), "learning_rate"))
        dots = {int(each.get("data-t")): float(each.get("cx")) for each in drawing.iter("circle") if each.get("data-t")}
        assert (dots[1] - dots[0] == pytest.approx(dots[2] - dots[1], abs=0.2)) is even


def test_axes_of_a_single_value():
    one = Trial(0, {"seed": 3}, "running", [(0, 0.5)], {METRIC: 0.5}, 1.0)
    single = view([one], space={"seed": Domain("randint", (3, 4))})
    (dot,) = [each for each in ET.fromstring(scatter(single, "seed")).iter("circle") if each.get("data-t")]
    assert float(dot.get("cx")) == (54 + 326) / 2
    assert points(of_class(ET.fromstring(learning_curves(single, WIDE)), "curve")[0])[0][0] == 62


def test_trials_of_one_category_are_side_by_side():
    trials = [trial(i, 0.5) for i in range(30)] + [trial(30, 0.5, lr_scheduler_type="cosine")]
    drawing = ET.fromstring(scatter(view(trials), "lr_scheduler_type"))
    dots = {int(each.get("data-t")): float(each.get("cx")) for each in drawing.iter("circle") if each.get("data-t")}
    assert len(set(dots.values())) == 31 and max(dots[i] for i in range(30)) < dots[30] - 20


@pytest.mark.parametrize(
    ("name", "length", "rows"),
    [
        ("seed", 6, ["seed"]),
        ("learning_rate", 13, ["learning_rate"]),
        ("learning_rate", 9, ["learning_", "rate"]),
        ("query_instruction_for_retrieval", 16, ["query_", "instruction_for_", "retrieval"]),
    ],
)
def test_names_break_after_underscores(name, length, rows):
    assert wrap_name(name, length) == rows


# --- any outcome of the trials ----------------------------------------------------------------------------------------

VALUES = st.floats(-1e6, 1e6) | st.just(0.5) | st.sampled_from([math.nan, math.inf])
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=60)


@st.composite
def any_search(draw):
    """Trials with any outcome, including values outside of their domain."""
    space = {
        "a": draw(st.sampled_from([Domain("uniform", (-1.0, 1.0)), Domain("quniform", (0.0, 1.0, 0.5))])),
        "b": draw(st.sampled_from([Domain("loguniform", (1e-9, 1.0)), Domain("lograndint", (1, 2))])),
        "c": Domain(draw(st.sampled_from(["choice", "grid"])), tuple(draw(st.lists(TEXTS, min_size=1, unique=True)))),
        "d": Domain("randint", (3, 4)),
    }
    trials = []
    for number in range(draw(st.integers(0, 8))):
        flags = {
            "a": draw(st.floats(-2, 2)),
            "b": draw(st.floats(0, 2)),
            "c": draw(TEXTS),
            "d": draw(st.integers(-5, 5)),
        }
        for name in draw(st.sets(st.sampled_from("abcd"), max_size=1)):
            del flags[name]
        steps = sorted(draw(st.sets(st.integers(0, 10**7), max_size=4)))
        curve = [(step, draw(VALUES)) for step in steps]
        metrics = {METRIC: curve[-1][1]} if curve else {}
        status = draw(st.sampled_from(STATUSES))
        trials.append(Trial(number, flags, status, curve, metrics, draw(st.floats(0, 1e7)), draw(st.none() | TEXTS)))
    return search(trials, space, draw(st.sampled_from(["max", "min"])))


@settings(max_examples=40)
@given(any_search())
def test_any_search_has_a_page(report):
    page = html(report)
    Page(page)
    assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', re.sub(r"<title>.*?</title>|<td.*?</td>", "", page, flags=re.S))
    seen = TrialView(report.trials, report.metric, report.mode, report.space)
    for drawn in [
        learning_curves(seen, WIDE),
        learning_curves(seen, NARROW),
        *(scatter(seen, name) for name in report.space),
    ]:
        if drawn:
            assert_inside(ET.fromstring(drawn))


def assert_inside(drawing):
    """Assert that every mark is inside the drawing."""
    _, _, width, height = map(float, drawing.get("viewBox").split())
    for each in drawing.iter("circle"):
        assert 0 <= float(each.get("cx")) <= width and 0 <= float(each.get("cy")) <= height
    for each in of_class(drawing, "curve"):
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points(each))


def test_size_is_bounded_for_two_hundred_trials():
    trials = [trial(i, 0.5 + math.sin(i) / 10, learning_rate=10 ** (-6 + 2 * (i % 50) / 50)) for i in range(200)]
    page = html(search(trials))
    assert len(page) < 1_500_000
    assert len(set(re.findall(r'data-t="(\d+)"', page))) == 200
