"""Report page of mining."""

import re

from pages import EVIL, LONG, Page, assert_escaped, mining

from raybge.mining import page as mine
from raybge.mining.relabelling import RelabelSpec, RelabelStatistics
from raybge.mining.statistics import LikelyFalseNegative, MiningStatistics


def test_page_shows_statistics():
    page = Page(mine.html(mining()))
    assert "120 rows with 10 negatives" in page.text and "total time 1 min 3 s · 10 negatives a row" in page.text
    assert (
        "passages300" in page.text
        and "rows completed with random passages9" in page.text
        and "rows with fewer negatives3" in page.text
    )
    assert "negatives above their positive23 (2.3%, 95% interval 1.4% to 3.3%)" in page.text
    assert "120 positives and 1,090 chosen negatives" in page.text and "88 random negatives" in page.text
    assert "178 more are random" in page.text
    rows = re.findall(r"<tr>(.*?)</tr>", mine.html(mining()))
    assert [re.sub(r"<[^>]*>", "|", row) for row in rows if "%" in row] == [
        "|0||1||0.8%|",
        "|4||2||1.7%|",
    ]
    assert "+0.1700 · negative 0.78, positive 0.61" in page.text and "+0.0000" in page.text
    assert "by the model, one per row" in page.text and "--learning_rate 2e-05" in page.text


def test_free_texts_are_escaped():
    assert_escaped(mine.html(mining(EVIL)), 10)


def relabelled(text="plain"):
    example = {"query": text, "positive": text, "negative": text, "verdict": "grade 3 of 3"}
    return {"relabelling": RelabelStatistics(1200, 34, 20, 1, 5, [example]), "outcome": RelabelSpec("drop").outcome}


def test_page_shows_the_relabelling():
    page = Page(mine.html(mining(**relabelled())))
    assert "34 of 1,200 negatives were taken for positives and dropped, in 20 rows, of which 1 have no neg" in page.text
    assert "5 rows without a judgment are as they were" in page.text and "grade 3 of 3" in page.text
    assert "negatives taken for positives34 of 1,200" in page.text and "rows without a judgment5" in page.text
    none = Page(mine.html(mining(relabelling=RelabelStatistics(), outcome="dropped", statistics=None)))
    assert "No negative was taken for a positive" in none.text
    assert "Relabelled" not in Page(mine.html(mining())).text
    assert_escaped(mine.html(mining(EVIL, **relabelled(EVIL))), 13)


def test_page_without_statistics():
    page = Page(mine.html(mining(statistics=None, summary={"rows": 7}, seconds={})))
    assert "7 rows with scores" in page.text and "Ranks" not in page.text
    page = Page(mine.html(mining(statistics=MiningStatistics())))
    assert "0 rows with 10 negatives" in page.text and not any(tag == "svg" for tag, _ in page.elements)
    unknown = Page(mine.html(mining(statistics=MiningStatistics(rows=2, negatives=mining().statistics.negatives))))
    assert "The pool contains none of the positives: --keep_scores" in unknown.text
    assert "Most likely" not in unknown.text and "Every row has the requested number" in unknown.text


def test_long_texts_are_shortened():
    many = [LikelyFalseNegative(LONG, LONG, LONG, 0.5, 0.6)] * 20
    statistics = MiningStatistics(
        rows=20, false_negatives=many, negatives=mining().statistics.negatives, ranks=mining().statistics.ranks
    )
    assert len(mine.html(mining(statistics=statistics))) < 100_000
