"""Report page of the demo."""

from pages import EVIL, Page, assert_escaped, demo

from raybge.quickstart.page import html


def test_page_shows_metrics_and_links():
    page = Page(html(demo("training")))
    assert "nDCG@10 0.4000 → 0.5000" in page.text and "training1,200" in page.text
    assert "nDCG@100.40000.5000+0.1000" in page.text and "total time 1 min 1 s" in page.text
    assert [attributes["href"] for tag, attributes in page.elements if tag == "a"] == ["model/training.html"]


def test_free_texts_are_escaped():
    assert_escaped(html(demo(EVIL)), 5)
