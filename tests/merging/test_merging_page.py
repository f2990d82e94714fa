"""The report of a mixture."""

import itertools
import math
import re
from dataclasses import replace

from pages import EVIL, LONG, Page, mixture, run

from raybge.merging import page as merge
from raybge.merging.coefficient_search import MergeCandidate


def test_what_the_page_of_a_search_says():
    page = Page(merge.html(mixture()))
    assert "2 models mixed" in page.text and "nDCG@10 on the target0.6980" in page.text
    assert "nDCG@10 on the general set0.6000" in page.text and "mixtures measured11" in page.text
    assert "The search asked for 0.5880 on the general set or more" in page.text
    assert "raybge.merge" in page.text and "Found by a search." in page.text
    assert (
        sum(tag == "svg" for tag, _ in page.found) == 4
    )  # for a large console and a phone, each with its clipped part


def test_the_curve_has_every_mixture_and_marks_the_one_that_was_taken():
    drawn = re.findall(r'<div class="chart wide">(.*?)</div>', merge.html(mixture()), re.DOTALL)[0]
    dots = re.findall(r'<circle[^>]*class="dot (\w+)"[^>]*><title>(.*?)</title>', drawn, re.DOTALL)
    assert len(dots) == 11 and [colour for colour, _ in dots].count("best") == 1
    assert dots[-1] == ("best", "tuned: 0.6\nbase: 0.4\ntarget 0.6980, general 0.6000\nchosen")
    (curve,) = re.findall(r'd="M([^"]*)" class="curve r4"', drawn)
    assert curve.count("L") == 10 and 'class="middle"><title>at least 0.5880' in drawn
    assert drawn.count('class="halo"') == 2  # the two models' names


def test_points_lie_where_they_say():
    """Up is a better target, right is better in general; among them the same distance for the same difference."""
    drawn = re.findall(r'<div class="chart wide">(.*?)</div>', merge.html(mixture()), re.DOTALL)[0]
    places = {
        title: (float(x), float(y))
        for x, y, title in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)".*?<title>(.*?)</title>', drawn, re.DOTALL)
    }
    values = {title: [float(v) for v in re.findall(r"(?:target|general) ([\d.]+)", title)] for title in places}
    for axis, value, sign in ((1, 0, -1), (0, 1, 1)):
        pairs = sorted((values[title][value], sign * place[axis]) for title, place in places.items())
        rates = {round((b[1] - a[1]) / (b[0] - a[0])) for a, b in itertools.pairwise(pairs) if b[0] - a[0] > 0.005}
        assert min(rates) > 0 and max(rates) - min(rates) <= 0.05 * max(rates)


def test_the_table_of_mixtures():
    mixtures = merge.html(mixture()).partition("<h2>Mixtures</h2>")[2].partition("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", mixtures, re.DOTALL)
    heads = ["weight of tuned", "weight of base", "target", "general"]
    assert re.findall(r"<th[^>]*>(.*?)</th>", rows[0]) == heads
    assert 'class="best"' not in rows[1] and rows[1].count("<td") == 4 and len(rows) == 12
    assert sum('class="best"' in row for row in rows) == 1


def test_given_weights_and_losses():
    plain = Page(merge.html(mixture(candidates=(), least=None)))
    assert "As they were given." in plain.text and "tuned0.6000base0.4000" in plain.text.replace("\n", "")
    assert not any(tag == "svg" for tag, _ in plain.found) and "Mixtures" not in plain.text
    scored = Page(merge.html(mixture(candidates=(), least=None, losses=[0.25, 1.5])))
    assert "softmax(-loss / temperature)" in scored.text and "0.60000.2500" in scored.text


def test_a_search_without_a_second_set_or_of_three_models():
    alone = [replace(each, general=None) for each in mixture().candidates]
    page = Page(merge.html(mixture(candidates=alone, least=None)))
    assert "Target against general" not in page.text and "Mixtures" in page.text and "target0.6980" in page.text
    three = [MergeCandidate((1.0, 0.0, 0.0), 0.5, 0.5), MergeCandidate((0.2, 0.3, 0.5), 0.6, 0.4)]
    text = merge.html(mixture(models=["a", "b", "c"], weights=[0.2, 0.3, 0.5], candidates=three, least=0.3))
    assert 'class="curve' not in text and "3 models mixed" in text and text.count('class="dot best"') == 2
    odd = [MergeCandidate((1.0, 0.0), math.nan, 0.5), MergeCandidate((0.0, 1.0), 0.5, 0.5)]
    assert "no number" in merge.html(mixture(weights=[0.0, 1.0], candidates=odd, least=-math.inf))


def test_texts_from_outside_are_escaped_and_long_ones_cut():
    page = merge.html(mixture(models=[EVIL, EVIL], run=run("merge", EVIL)))
    assert page.count("<script>") == 1 and Page(page).text.count(EVIL) >= 4
    long = merge.html(mixture(models=[LONG[:300], LONG[:299] + "x"]))
    assert "…" in long and len(Page(long).found) == len(Page(merge.html(mixture())).found)
