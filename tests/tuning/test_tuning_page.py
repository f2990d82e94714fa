"""Report page of tuning: a self-contained file for any outcome of the trials."""

import math
import re
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
from pages import EVIL, Page, assert_escaped, evaluation, mining, training
from searches import METRIC, SIX, SPACE, search, trial

from raybge.evaluation import page as evaluate
from raybge.mining import page as mine
from raybge.report.text import shell_command
from raybge.training import page as train
from raybge.tuning.page import TuningReport, html, write
from raybge.tuning.records import Trial
from raybge.tuning.search_space import Domain
from raybge.util.errors import UserError


def test_page_is_self_contained():
    page = html(search(SIX))
    for tag, attributes in Page(page).elements:
        assert tag not in ("img", "iframe", "object", "audio", "video")
        assert attributes.get("src") is None and attributes.get("href") in (None, "data:,")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.replace("// The page", ""))
    assert "default-src 'none'" in page


def test_heading_summarizes_the_search():
    text = Page(html(search(SIX, facts={"scheduler": "ASHA"}))).text
    assert "Best nDCG@10: 0.6500, trial 1" in text
    assert "6 trials: 3 finished, 1 stopped early, 1 failed, 1 running" in text
    assert "100 steps" in text and "1 min 15 s of training" in text and "higher nDCG@10 is better" in text
    assert "0.4000 → 0.6500" in text and "learning_rate5e-5" in text and "schedulerASHA" in text
    assert "Command to train trial 1 again" in text and "python -m raybge.train \\\n    --seed 1" in text


def test_a_lower_metric_can_be_better():
    text = Page(html(search(SIX, mode="min"))).text
    assert "Best nDCG@10: 0.5800, trial 4" in text and "lower nDCG@10 is better" in text


def test_page_without_a_metric():
    failed = [trial(0, None, "failed"), trial(1, None, "failed")]
    page = Page(html(search(failed)))
    assert "No trial has measured nDCG@10" in page.text and "2 trials: 2 failed" in page.text
    assert "raybge.train" not in page.text and "raybge.tune" in page.text
    assert not any(tag == "svg" for tag, _ in page.elements)
    assert page.text.count("out of memory") == 2
    assert "0 trials" in Page(html(search([]))).text
    nan = Trial(0, {}, "failed", [(1, math.nan)], {METRIC: math.nan}, 1.0)
    assert "Learning curves" not in html(search([nan])) and "All trials" in html(search([nan]))


def test_free_texts_are_escaped():
    bad = Trial(0, {EVIL: EVIL}, "failed", [(0, 0.5)], {METRIC: 0.5, EVIL: 1.0}, 1.0, EVIL)
    space = {EVIL: Domain("choice", (EVIL, "b"))}
    page = html(TuningReport([EVIL], EVIL, "max", space, [bad], [[EVIL]], {EVIL: EVIL}))
    assert_escaped(page, 14)


def test_page_shows_commands_unchanged():
    report = TuningReport(["a", "--b", "c & d"], METRIC, "max", SPACE, SIX, [["x", "--y", "it's"], ["z", "--w", "1"]])
    text = Page(html(report)).text
    assert shell_command(report.command) in text and all(shell_command(each) in text for each in report.best_commands)
    assert shell_command(report.command) == "a \\\n    --b 'c & d'"


def test_table_lists_every_trial_best_first():
    page = html(search([*SIX, Trial(6, {"seed": 7}, "finished", [(5, 0.1)], {METRIC: 0.1, "MRR@10": 0.25}, 1.0)]))
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    rows = [re.sub(r"<[^>]*>", "|", row.replace("<wbr>", "")) for row in body.strip().splitlines()[1:]]
    order = [int(re.search(r"\d+", row)[0]) for row in rows]
    assert order == [1, 0, 4, 2, 5, 6, 3]
    assert "0.6500" in rows[0] and "|5e-5|" in rows[0] and "|linear|" in rows[0] and "|20|" in rows[0]
    assert "|stopped early|" in rows[3] and "|12.5|" in rows[3]
    assert "|7|" in rows[5] and "0.2500" in rows[5]
    assert "|failed|" in rows[6] and "|out of memory|" in rows[6] and "|–|" in rows[6]
    assert '<tr data-t="1" class="best"' in body.strip().splitlines()[1] and body.count('class="best"') == 1
    heads = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', page.replace("<wbr>", ""))
    assert heads == ["trial", "status", METRIC, *SPACE, "seed", "MRR@10", "steps", "seconds", "reason"]
    assert 'class="number">learning_rate' in page and 'class="number">lr_scheduler_' not in page


def test_style_defines_all_classes_and_both_modes_all_colors():
    css = (files("raybge.report") / "page.css").read_text()
    pages = [html(search(SIX)), train.html(training()), mine.html(mining()), evaluate.html(evaluation())]
    elements = [attributes for page in pages for _, attributes in Page(page).elements]
    used = {name for attributes in elements for name in (attributes.get("class") or "").split()}
    unstyled = {"tick"}  # like every text of a chart
    assert used - unstyled <= set(re.findall(r"\.([a-z][a-z0-9-]*)", css))
    light, dark = re.findall(r":root \{(.*?)\}", css, re.S)
    names = set(re.findall(r"--[a-z0-9]+(?=:)", light))
    assert names == set(re.findall(r"--[a-z0-9]+(?=:)", dark)) and len(names) == 18
    assert set(re.findall(r"var\((--[a-z0-9]+)\)", css)) <= names | {"--c"}


def test_colors_are_distinguishable():
    """Contrast by WCAG 2: 4.5 for text, 3 for marks, increasing from worst to best."""
    css = (files("raybge.report") / "page.css").read_text()
    for look in re.findall(r":root \{(.*?)\}", css, re.S):
        color = {name: _luminance(value) for name, value in re.findall(r"--(\w+): (#[0-9a-f]+)", look)}

        def contrast(a, b, color=color):
            high, low = sorted((color[a], color[b]), reverse=True)
            return (high + 0.05) / (low + 0.05)

        assert all(contrast(name, ground) >= 4.5 for name in ("ink", "soft") for ground in ("paper", "raised"))
        assert contrast("best", "paper") >= 3 and contrast("axis", "paper") >= 3
        ramp = [contrast(f"r{i}", "paper") for i in range(9)]
        assert ramp == sorted(ramp) and ramp[0] >= 1.6 and ramp[-1] >= 10
        assert all(b / a >= 1.08 for a, b in pairwise(ramp))


def _luminance(color):
    digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_file_is_complete_or_unchanged(tmp_path):
    path = tmp_path / "report.html"
    write(str(path), search(SIX))
    assert path.read_text(encoding="utf-8") == html(search(SIX))
    with pytest.raises(UnicodeEncodeError):
        write(str(path), search([trial(0, 0.5, lr_scheduler_type="\ud800")]))
    assert path.read_text(encoding="utf-8") == html(search(SIX)) and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="--output_dir"):
        write(str(path / "x"), search(SIX))


def test_style_and_templates_are_in_the_package():
    assert {path.name for path in Path(str(files("raybge.report"))).iterdir()} >= {"page.css", "page.js", "templates"}
