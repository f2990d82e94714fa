"""The reports of mining and of an evaluation."""

import math
import re

from pages import EVIL, LONG, Page, evaluation, measurement, mining, run

from raybge.evaluation import mteb_page as tasks
from raybge.evaluation import page as evaluate
from raybge.evaluation.metric_changes import Change
from raybge.mining import page as mine
from raybge.mining.statistics import Suspect, Tally


def test_what_the_page_of_mining_says():
    page = Page(mine.html(mining()))
    assert "120 rows with 10 negatives" in page.text and "1 min 3 s in all · 10 negatives a row" in page.text
    assert "passages300" in page.text and "rows filled up at random9" in page.text and "rows with fewer3" in page.text
    assert "negatives above their positive23 (2.3%)" in page.text
    assert "120 positives and 1,090 chosen negatives" in page.text and "88 negatives, random ones" in page.text
    assert "178 more are random" in page.text
    rows = re.findall(r"<tr>(.*?)</tr>", mine.html(mining()))
    assert [re.sub(r"<[^>]*>", "|", row) for row in rows if "%" in row] == [
        "|0||1||0.8%|",
        "|4||2||1.7%|",
    ]
    assert "+0.1700 · 0.78 beside 0.61" in page.text and "+0.0000" in page.text
    assert "by the model, one of a row" in page.text and "--learning_rate 2e-05" in page.text


def test_texts_from_outside_are_escaped():
    evil = ((mine.html(mining(EVIL)), 10), (evaluate.html(evaluation(EVIL)), 6), (tasks.html(measurement(EVIL)), 12))
    for page, least in evil:
        assert page.count("<script>") == 1
        found = Page(page)
        assert found.text.count(EVIL) >= least
        assert not any(name.startswith("on") for _, attributes in found.found for name in attributes)


def test_mining_without_much_to_say():
    page = Page(mine.html(mining(tally=None, summary={"rows": 7}, seconds={})))
    assert "7 rows with scores" in page.text and "Ranks" not in page.text
    page = Page(mine.html(mining(tally=Tally())))
    assert "0 rows with 10 negatives" in page.text and not any(tag == "svg" for tag, _ in page.found)
    unknown = Page(mine.html(mining(tally=Tally(rows=2, negatives=mining().tally.negatives))))
    assert "The pool has none of the positives: --keep_scores" in unknown.text
    assert "Likeliest" not in unknown.text and "Every row has as many as were asked for" in unknown.text


def test_long_texts_are_cut():
    many = [Suspect(LONG, LONG, LONG, 0.5, 0.6)] * 20
    tally = Tally(rows=20, suspects=many, negatives=mining().tally.negatives, ranks=mining().tally.ranks)
    assert len(mine.html(mining(tally=tally))) < 100_000


def test_what_the_page_of_an_evaluation_says():
    page = Page(evaluate.html(evaluation()))
    assert "nDCG@10 0.5100" in page.text and "queries50" in page.text and "corpus3,000" in page.text
    assert "@1@10@100" in page.text and "nDCG0.50000.51000.5200" in page.text and "MRR0.53000.54000.5500" in page.text
    assert "nDCG@100.41000.5100+0.1000+0.0500 to +0.1500better" in page.text
    assert page.text.count("median 0.5000; 40.0% at 0, 40.0% at 1") == 6
    assert sum(tag == "svg" for tag, _ in page.found) == 6


def test_what_the_page_of_tasks_says():
    page = Page(tasks.html(measurement("NFCorpus")))
    assert (
        "3 tasks of MTEB" in page.text and "3 min 45 s in all" in page.text and "mean of Retrieval0.6100" in page.text
    )
    assert "mean of STS" not in page.text and "NFCorpusSTSndcg_at_100.61001 min 15 s" in page.text
    assert "NFCorpus, dev" in page.text and "NFCorpus, test, NFCorpus" in page.text
    assert "map_at_100.5000" in page.text and "no number" in page.text and "eng-Latn" not in page.text
    one = Page(tasks.html(tasks.Measurement(run("evaluate"), measurement("NFCorpus").tasks[:1])))
    assert "NFCorpus: ndcg_at_10 0.6100" in one.text


def test_an_evaluation_without_queries_or_comparison():
    page = Page(evaluate.html(evaluation(per_query={}, comparison=())))
    assert "nDCG@10 0.5100" in page.text and "Compared" not in page.text and "Query by query" not in page.text
    assert "without a metric" in Page(evaluate.html(evaluation(metrics={}, per_query={}, comparison=()))).text
    odd = evaluation(per_query={"nDCG@10": [math.nan, 0.5], "a": [math.nan]}, comparison=[Change("x", None, math.nan)])
    page = evaluate.html(odd)
    assert "1 without a number" in page and page.count('role="img"') == 1 and "no number" in page


def test_the_last_bar_holds_what_is_found_first():
    """1.0 lies in the bar below 1, so that the axis ends there."""
    page = evaluate.html(evaluation(per_query={"nDCG@10": [0.0, 0.96, 1.0]}))
    (path,) = re.findall(r'<path d="M([^"]*)" class="area', page)
    assert path.count("L") == 2 * 20 + 1
