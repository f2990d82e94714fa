"""Report pages of an evaluation and of MTEB tasks."""

import math
import re

from pages import EVIL, Page, assert_escaped, evaluation, mteb, run

from raybge.evaluation import mteb_page, page
from raybge.evaluation.metric_changes import MetricChange


def test_free_texts_are_escaped():
    assert_escaped(page.html(evaluation(EVIL)), 6)
    assert_escaped(mteb_page.html(mteb(EVIL)), 12)


def test_page_of_an_evaluation():
    shown = Page(page.html(evaluation()))
    assert "nDCG@10 0.5100" in shown.text and "queries50" in shown.text and "corpus3,000" in shown.text
    assert "metric@1@10@100" in shown.text and "nDCG0.50000.51000.5200" in shown.text
    assert "MRR0.68000.69000.7000" in shown.text and "AUC––0.7100" in shown.text
    assert "nDCG@100.41000.5100+0.1000+0.0500 to +0.1500better" in shown.text
    assert shown.text.count("median 0.5000; 40.0% at 0, 40.0% at 1") == 6
    assert "2 queries with the lowest nDCG@10" in shown.text and "not retrieved" in shown.text
    assert "nDCG@10 0.4000 · first relevant passage: rank 2" in shown.text
    assert "+0.9000 · nDCG@10 0.0000 → 0.9000 · first relevant passage: not retrieved → rank 1" in shown.text
    assert sum(tag == "svg" for tag, _ in shown.elements) == 6


def test_page_of_mteb_tasks():
    shown = Page(mteb_page.html(mteb("NFCorpus")))
    assert (
        "3 MTEB tasks" in shown.text
        and "total time 3 min 45 s" in shown.text
        and "mean of Retrieval0.6100" in shown.text
    )
    assert "mean of STS" not in shown.text and "NFCorpusSTS0.6100ndcg_at_101 min 15 s" in shown.text
    assert "NFCorpus, dev" in shown.text and "NFCorpus, test, NFCorpus" in shown.text
    assert "map_at_100.5000" in shown.text and "not finite" in shown.text and "eng-Latn" not in shown.text
    one = Page(mteb_page.html(mteb_page.MtebReport(run("evaluate"), mteb("NFCorpus").tasks[:1])))
    assert "NFCorpus: ndcg_at_10 0.6100" in one.text


def test_an_evaluation_without_queries_or_comparison():
    shown = Page(page.html(evaluation(per_query={}, comparison=())))
    assert "nDCG@10 0.5100" in shown.text and "Comparison" not in shown.text and "Values per query" not in shown.text
    assert "without a metric" in Page(page.html(evaluation(metrics={}, per_query={}, comparison=()))).text
    odd = evaluation(
        per_query={"nDCG@10": [math.nan, 0.5], "a": [math.nan]}, comparison=[MetricChange("x", None, math.nan)]
    )
    document = page.html(odd)
    assert "1 not finite" in document and "not finite</td>" in document and document.count('role="img"') == 1


def test_last_bar_contains_one():
    """1.0 is counted in the bar below 1, so that the axis ends there."""
    document = page.html(evaluation(per_query={"nDCG@10": [0.0, 0.96, 1.0]}))
    (path,) = re.findall(r'<path d="M([^"]*)" class="area', document)
    assert path.count("L") == 2 * 20 + 1
