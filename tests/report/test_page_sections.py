"""Sections that pages share: the details of the run and the time of each stage."""

import re

import pytest
from pages import Page, demo, evaluation, merging, mining, mteb, training

from raybge.evaluation import mteb_page
from raybge.evaluation import page as evaluate
from raybge.merging import page as merge
from raybge.mining import page as mine
from raybge.quickstart import page as quickstart
from raybge.report.run_details import MAX_NAME, RunDetails
from raybge.training import page as train

PAGES = {
    "train": (train.html, training),
    "mine": (mine.html, mining),
    "evaluate": (evaluate.html, evaluation),
    "mteb": (mteb_page.html, mteb),
    "merge": (merge.html, merging),
    "demo": (quickstart.html, demo),
}


def section(page, heading):
    """Return the text of the section, without spaces around tags; None if the page has none."""
    match = re.search(rf"<h2>{heading}</h2>(.*?)</section>", page, re.DOTALL)
    return match and re.sub(r">\s+|\s+<", lambda part: part[0].strip(), match[1]).replace("<wbr>", "")


@pytest.mark.parametrize("kind", PAGES)
def test_run_details(kind):
    html, content = PAGES[kind]
    report = content(text="model-a")
    details = section(html(report), "Run details")
    command = details[details.index("<code>") : details.index("</code>")]
    assert f"python -m raybge.{report.run.command}" in command
    assert "--learning_rate 2e-05" in command and "--train_data model-a b.jsonl" in command
    assert "<dt>model</dt><dd>model-a</dd>" in details and "<dt>device</dt><dd>model-a</dd>" in details
    assert re.search(r"<td[^>]*>model-a</td><td[^>]*>1,200</td>", details)
    assert re.search(r"<td[^>]*>b\.jsonl</td><td[^>]*>–</td>", details)
    assert "<dt>torch</dt><dd>2.13</dd>" in details
    Page(details)


@pytest.mark.parametrize(
    ("kind", "rows"),
    [("mine", [("encode", "1 min 1 s"), ("search", "2.0 s")]), ("demo", [("mine", "1 min 1 s")])],
)
def test_time_of_each_stage(kind, rows):
    html, content = PAGES[kind]
    time = section(html(content()), "Time")
    assert re.findall(r"<td>(.*?)</td><td class=\"number\">(.*?)</td>", time) == rows


def test_no_time_section_without_stages():
    assert section(mine.html(mining(seconds={})), "Time") is None


@pytest.mark.parametrize("kind", PAGES)
def test_title_and_head_name_run_model_and_data(kind):
    html, content = PAGES[kind]
    page = Page(html(content()))
    command = content().run.command
    head = page.text[page.text.index(f"raybge.{command} · run plain") :]  # the eyebrow above the heading
    title = page.text.strip().splitlines()[0]
    assert title.endswith(f" · raybge.{command}") and " · plain · " in title
    if kind != "merge":
        assert head.startswith(f"raybge.{command} · run plain · model plain")
    else:
        assert "model tuned, base" in head
    assert ("data plain, b.jsonl" in head) == (kind != "mteb")


def test_names_in_a_head_are_short_and_have_no_secrets():
    details = RunDetails(
        "train",
        {"output_dir": "/home/someone/runs/mine/"},
        "/models/" + "x" * 200,
        [(f"s3://key:SECRET@bucket/part-{i}.jsonl", 3) for i in range(5)],
    )
    head = details.head("nDCG@10 0.5")
    assert (head.run, head.data) == ("mine", "part-0.jsonl, part-1.jsonl and 3 more") and len(head.model) == MAX_NAME
    assert RunDetails("mine", {"output_file": "s3://b/mined.jsonl"}, "BAAI/bge-m3").head("t").document_title == (
        "t · mined.jsonl · BAAI/bge-m3 · raybge.mine"
    )
    assert RunDetails("mine").head("t").subject == [] and "SECRET" not in head.summary
