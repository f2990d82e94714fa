"""Report page of merging."""

import itertools
import math
import re
from dataclasses import replace

from pages import EVIL, LONG, Page, merging, run

from raybge.merging import page as merge
from raybge.merging.weight_search import MergeCandidate


def test_page_of_a_search():
    page = Page(merge.html(merging()))
    assert "Merge of 2 models" in page.text and "nDCG@10 on the target set0.6980" in page.text
    assert "nDCG@10 on the general set0.6000" in page.text and "candidates evaluated11" in page.text
    assert "The search required at least 0.5880 on the general set" in page.text
    assert "raybge.merge" in page.text and "Determined by a search." in page.text
    assert (
        sum(tag == "svg" for tag, _ in page.elements) == 4
    )  # for a large console and a phone, each with its clipped part


def test_curve_has_every_candidate_and_marks_the_selected_one():
    drawn = re.findall(r'<div class="chart wide">(.*?)</div>', merge.html(merging()), re.DOTALL)[0]
    dots = re.findall(r'<circle[^>]*class="dot (\w+)"[^>]*><title>(.*?)</title>', drawn, re.DOTALL)
    assert len(dots) == 11 and [color for color, _ in dots].count("best") == 1
    assert dots[-1] == ("best", "tuned: 0.6\nbase: 0.4\ntarget 0.6980, general 0.6000\nselected")
    (curve,) = re.findall(r'd="M([^"]*)" class="curve r4"', drawn)
    assert curve.count("L") == 10 and 'class="middle"><title>at least 0.5880' in drawn
    assert drawn.count('class="halo"') == 2  # the two models' names


def test_points_are_at_their_values():
    """Up is a better target, right is better on the general set; equal differences have equal distances."""
    drawn = re.findall(r'<div class="chart wide">(.*?)</div>', merge.html(merging()), re.DOTALL)[0]
    places = {
        title: (float(x), float(y))
        for x, y, title in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)".*?<title>(.*?)</title>', drawn, re.DOTALL)
    }
    values = {title: [float(v) for v in re.findall(r"(?:target|general) ([\d.]+)", title)] for title in places}
    for axis, value, sign in ((1, 0, -1), (0, 1, 1)):
        pairs = sorted((values[title][value], sign * place[axis]) for title, place in places.items())
        rates = {round((b[1] - a[1]) / (b[0] - a[0])) for a, b in itertools.pairwise(pairs) if b[0] - a[0] > 0.005}
        assert min(rates) > 0 and max(rates) - min(rates) <= 0.05 * max(rates)


def test_table_of_candidates():
    candidates = merge.html(merging()).partition("<h2>Candidates</h2>")[2].partition("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", candidates, re.DOTALL)
    heads = ["weight of tuned", "weight of base", "target", "general"]
    assert re.findall(r"<th[^>]*>(.*?)</th>", rows[0]) == heads
    assert 'class="best"' not in rows[1] and rows[1].count("<td") == 4 and len(rows) == 12
    assert sum('class="best"' in row for row in rows) == 1


def test_weights_from_flags_and_from_losses():
    plain = Page(merge.html(merging(candidates=(), general_threshold=None)))
    assert "As specified by the flags." in plain.text and "tuned0.6000base0.4000" in plain.text.replace("\n", "")
    assert not any(tag == "svg" for tag, _ in plain.elements) and "Candidates" not in plain.text
    scored = Page(merge.html(merging(candidates=(), general_threshold=None, losses=[0.25, 1.5])))
    assert "softmax(-loss / temperature)" in scored.text and "0.60000.2500" in scored.text


def test_search_without_a_general_set_and_of_three_models():
    alone = [replace(each, general=None) for each in merging().candidates]
    page = Page(merge.html(merging(candidates=alone, general_threshold=None)))
    assert (
        "Target against general set" not in page.text and "Candidates" in page.text and "target set0.6980" in page.text
    )
    three = [MergeCandidate((1.0, 0.0, 0.0), 0.5, 0.5), MergeCandidate((0.2, 0.3, 0.5), 0.6, 0.4)]
    text = merge.html(merging(models=["a", "b", "c"], weights=[0.2, 0.3, 0.5], candidates=three, general_threshold=0.3))
    assert 'class="curve' not in text and "Merge of 3 models" in text and text.count('class="dot best"') == 2
    odd = [MergeCandidate((1.0, 0.0), math.nan, 0.5), MergeCandidate((0.0, 1.0), 0.5, 0.5)]
    assert "not finite" in merge.html(merging(weights=[0.0, 1.0], candidates=odd, general_threshold=-math.inf))


def test_free_texts_are_escaped_and_long_ones_shortened():
    page = merge.html(merging(models=[EVIL, EVIL], run=run("merge", EVIL)))
    assert page.count("<script>") == 1 and Page(page).text.count(EVIL) >= 4
    long = merge.html(merging(models=[LONG[:300], LONG[:299] + "x"]))
    assert "…" in long and len(Page(long).elements) == len(Page(merge.html(merging())).elements)
