"""The report of a search: one file that says everything, whatever the trials came to."""

import math
import re
import subprocess
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
from pages import EVIL, Page, evaluation, mining, training
from searches import METRIC, SIX, SPACE, search, trial

from raybge.evaluation import page as evaluate
from raybge.mining import page as mine
from raybge.report.page import duration, shell
from raybge.training import page as train
from raybge.tuning.page import Search, html, write
from raybge.tuning.records import Trial
from raybge.tuning.search_space import Domain
from raybge.util.errors import UserError


def test_the_page_needs_nothing_else():
    page = html(search(SIX))
    for tag, attributes in Page(page).found:
        assert tag not in ("img", "iframe", "object", "audio", "video")
        assert attributes.get("src") is None and attributes.get("href") in (None, "data:,")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.replace("// Without", ""))
    assert "default-src 'none'" in page


def test_what_the_heading_says():
    text = Page(html(search(SIX, about={"scheduler": "ASHA"}))).text
    assert "Best nDCG@10: 0.6500, trial 1" in text
    assert "6 trials: 3 finished, 1 stopped early, 1 failed, 1 running" in text
    assert "100 steps" in text and "1 min 15 s of training" in text and "higher nDCG@10 is better" in text
    assert "0.4000 → 0.6500" in text and "learning_rate5e-5" in text and "schedulerASHA" in text
    assert "Trains trial 1 again" in text


def test_a_lower_metric_can_be_better():
    text = Page(html(search(SIX, mode="min"))).text
    assert "Best nDCG@10: 0.5800, trial 4" in text and "lower nDCG@10 is better" in text


def test_without_a_metric_the_page_says_so():
    failed = [trial(0, None, "failed"), trial(1, None, "failed")]
    page = Page(html(search(failed)))
    assert "No trial has measured nDCG@10" in page.text and "2 trials: 2 failed" in page.text
    assert "raybge.train" not in page.text and "raybge.tune" in page.text
    assert not any(tag == "svg" for tag, _ in page.found)
    assert page.text.count("out of memory") == 2
    assert "0 trials" in Page(html(search([]))).text
    nan = Trial(0, {}, "failed", [(1, math.nan)], {METRIC: math.nan}, 1.0)
    assert "Learning curves" not in html(search([nan])) and "All trials" in html(search([nan]))


def test_texts_from_outside_are_escaped():
    bad = Trial(0, {EVIL: EVIL}, "failed", [(0, 0.5)], {METRIC: 0.5, EVIL: 1.0}, 1.0, EVIL)
    space = {EVIL: Domain("choice", (EVIL, "b"))}
    page = html(Search([EVIL], EVIL, "max", space, [bad], [EVIL], {EVIL: EVIL}))
    assert page.count("<script>") == 1  # our own
    found = Page(page)
    assert found.text.count(EVIL) > 12
    assert not any(name.startswith("on") for _, attributes in found.found for name in attributes)


@pytest.mark.parametrize(
    "value", ["plain", "", "two words", "it's", '"quoted"', "$HOME", "a\\b", "new\nline", "--flag", "*", "查询："]
)
def test_commands_are_the_shells(value):
    command = ["python", "-m", "raybge.train", "--query_instruction_for_retrieval", value, "--seed", "1"]
    given_back = subprocess.run(
        ["bash", "-c", "python() { printf '%s\\0' python \"$@\"; }\n" + shell(command)], capture_output=True, check=True
    )
    assert given_back.stdout.decode().split("\0")[:-1] == command


def test_commands_stand_on_the_page_as_they_are():
    one = Search(["a", "--b", "c & d"], METRIC, "max", SPACE, SIX, [["x", "--y", "it's"], ["z", "--w", "1"]])
    text = Page(html(one)).text
    assert shell(one.command) in text and all(shell(each) in text for each in one.best_commands)
    assert shell(one.command) == "a \\\n    --b 'c & d'"


def test_the_table_holds_every_trial_best_first():
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


def test_classes_have_a_look_and_both_looks_have_all_colours():
    css = (files("raybge.report") / "page.css").read_text()
    pages = [html(search(SIX)), train.html(training()), mine.html(mining()), evaluate.html(evaluation())]
    found = [attributes for page in pages for _, attributes in Page(page).found]
    used = {name for attributes in found for name in (attributes.get("class") or "").split()}
    plain = {"tick"}  # as every text of a chart
    assert used - plain <= set(re.findall(r"\.([a-z][a-z0-9-]*)", css))
    light, dark = re.findall(r":root \{(.*?)\}", css, re.S)
    names = set(re.findall(r"--[a-z0-9]+(?=:)", light))
    assert names == set(re.findall(r"--[a-z0-9]+(?=:)", dark)) and len(names) == 17
    assert set(re.findall(r"var\((--[a-z0-9]+)\)", css)) <= names | {"--c"}


def test_colours_can_be_told_apart():
    """Contrast as WCAG 2 has it: 4.5 for text, 3 for what stands out, rising from worst to best."""
    css = (files("raybge.report") / "page.css").read_text()
    for look in re.findall(r":root \{(.*?)\}", css, re.S):
        colour = {name: _luminance(value) for name, value in re.findall(r"--(\w+): (#[0-9a-f]+)", look)}

        def contrast(a, b, colour=colour):
            high, low = sorted((colour[a], colour[b]), reverse=True)
            return (high + 0.05) / (low + 0.05)

        assert all(contrast(name, ground) >= 4.5 for name in ("ink", "soft") for ground in ("paper", "raised"))
        assert contrast("best", "paper") >= 3 and contrast("axis", "paper") >= 3
        ramp = [contrast(f"r{i}", "paper") for i in range(9)]
        assert ramp == sorted(ramp) and ramp[0] >= 1.6 and ramp[-1] >= 10
        assert all(b / a >= 1.08 for a, b in pairwise(ramp))


def _luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "report.html"
    write(str(path), search(SIX))
    assert path.read_text(encoding="utf-8") == html(search(SIX))
    with pytest.raises(UnicodeEncodeError):
        write(str(path), search([trial(0, 0.5, lr_scheduler_type="\ud800")]))
    assert path.read_text(encoding="utf-8") == html(search(SIX)) and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="--output_dir"):
        write(str(path / "x"), search(SIX))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (12.34, "12.3 s"),
        (59.99, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (3599.9, "1 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_style_travels_with_the_package():
    assert {path.name for path in Path(str(files("raybge.report"))).iterdir()} >= {"page.css", "page.js"}
