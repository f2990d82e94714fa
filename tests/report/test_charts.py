"""Charts: marks at their positions, all texts escaped."""

import xml.etree.ElementTree as ET

from raybge.report.charts import Frame, bottom_axis, element, left_axis, line, mark, svg, text_label
from raybge.report.scales import Categories, Scale


def test_long_names_are_shortened_and_complete_in_the_tooltip():
    (tick,) = Categories(("a rather long name of a thing",), 0, 9).ticks(5, 12)
    assert (tick.label, tick.full) == ("a rather…ing", "a rather long name of a thing")
    axis = Categories(("a rather long name of a thing", "b"), 0, 60)
    drawn = bottom_axis(axis, Frame(0, 0, 60, 50), "flag", 5)
    assert "rotate(" in drawn and "<title>a rather long name of a thing</title>" in drawn


EVIL = "<script>\"'&</script>"


def test_texts_and_attributes_are_escaped():
    drawn = svg(
        99,
        99,
        EVIL,
        text_label(1, 2, EVIL, full=EVIL + "x"),
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
