"""Accessibility of the pages (WCAG 2.1 AA) as far as it follows from their source; `test_browser` checks the rest."""

import re
from datetime import datetime
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise

import pytest
from pages import demo, evaluation, merging, mining, mteb, training
from searches import SIX, search

import raybge.evaluation.mteb_page
import raybge.evaluation.page
import raybge.merging.page
import raybge.mining.page
import raybge.quickstart.page
import raybge.training.page
import raybge.tuning.page
from raybge.report.run_index import IndexedRun, index_html

CSS = (files("raybge.report") / "page.css").read_text(encoding="utf-8")
PAGES = {
    "train": raybge.training.page.html(training()),
    "mine": raybge.mining.page.html(mining()),
    "merge": raybge.merging.page.html(merging()),
    "evaluate": raybge.evaluation.page.html(evaluation()),
    "mteb": raybge.evaluation.mteb_page.html(mteb()),
    "tune": raybge.tuning.page.html(search(SIX)),
    "demo": raybge.quickstart.page.html(demo()),
    "runs": index_html("runs", [IndexedRun(training().run.head("a"), "a", "a/report.html", datetime(2026, 1, 2))]),
}


def luminance(color: str) -> float:
    """Relative luminance: https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    digits = color.removeprefix("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    """Contrast ratio: https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio"""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def themes() -> dict[str, dict[str, str]]:
    """Colors of the light and of the dark theme by name."""
    light, dark = (dict(re.findall(r"--([\w]+): (#\w+);", part)) for part in re.findall(r":root \{(.*?)\}", CSS, re.S))
    return {"light": light, "dark": light | dark}


class Elements(HTMLParser):
    """Elements of a page as (tag, attributes), and the ids that occur."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_formula_of_contrast():
    """The ends of the scale, and a value from the WCAG's own examples of failing text: #777 on white."""
    assert contrast("#000", "#fff") == pytest.approx(21) and contrast("#fff", "#ffffff") == 1
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("background", ["paper", "raised"])
@pytest.mark.parametrize("text", ["ink", "soft", "link", "best"])
def test_texts_have_enough_contrast(theme, background, text):
    colors = themes()[theme]
    if (text, background) == ("best", "raised"):
        pytest.skip("labels of charts are on paper")
    assert contrast(colors[text], colors[background]) >= 4.5  # 1.4.3


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_and_marks_have_enough_contrast(theme):
    """Colors that carry a meaning by themselves; of a ramp, whose ends are pale, the curves of a single run."""
    colors = themes()[theme]
    for name in ("r6", "r7", "r8", "best", "axis", "none"):
        assert contrast(colors[name], colors["paper"]) >= 3, name  # 1.4.11


@pytest.mark.parametrize("kind", PAGES)
def test_structure(kind):
    page = Elements(PAGES[kind])
    assert page.of("html") == [{"lang": "en"}]  # 3.1.1
    assert len(page.of("main")) == len(page.of("h1")) == 1
    assert re.search(r"<head>.*<title>[^<]+ · raybge.\w+</title>.*</head>", PAGES[kind], re.DOTALL)  # 2.4.2
    assert "user-scalable" not in page.of("meta")[1]["content"]  # 1.4.4
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))  # 1.3.1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("kind", PAGES)
def test_names_of_charts_and_tables(kind):
    page = Elements(PAGES[kind])
    drawings = [each for each in page.of("svg") if "x" not in each]  # others are parts of a drawing
    assert all(each.get("aria-label") or each.get("aria-hidden") == "true" for each in drawings)  # 1.1.1
    assert all(each.get("role") == "img" for each in drawings if each.get("aria-label"))
    assert all(each.get("scope") in ("col", "row") for each in page.of("th"))  # 1.3.1
    assert not page.of("img") and all(each.get("href") for each in page.of("a"))
    scrolling = [each for _, each in page.elements if each.get("class") in ("scroll", "command")]
    assert scrolling and all(each.get("tabindex") == "0" for each in scrolling)  # 2.1.1: by keyboard, too
