"""Index page of a folder of runs: one row for each report page, with a link that leads to it."""

import os
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from pages import EVIL, Page, assert_escaped, evaluation, merging, mining, training

import raybge.evaluation.page
import raybge.merging.page
import raybge.mining.page
import raybge.training.page
from raybge.report.run_index import write_index
from raybge.runs import main
from raybge.util.errors import UserError


class Links(HTMLParser):
    """Text of each link by its target."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.target = {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.target = dict(attrs)["href"] if tag == "a" else self.target

    def handle_endtag(self, tag):
        self.target = None if tag == "a" else self.target

    def handle_data(self, data):
        if self.target:
            self.targets[self.target] = self.targets.get(self.target, "") + data


@pytest.fixture
def runs(tmp_path):
    """Four runs: a model of its own, one below another folder, a file's page, and what is no run."""
    folder = tmp_path / "runs"
    pages = {
        "mine/report.html": raybge.training.page.html(training()),
        "round 1/model #2/report.html": raybge.merging.page.html(merging()),
        "text/mined.jsonl.report.html": raybge.mining.page.html(mining()),
        "after.json.report.html": raybge.evaluation.page.html(evaluation()),
        "mine/checkpoint-3/report.html": raybge.training.page.html(training()),
        "mine/.raybge/report.html": raybge.training.page.html(training()),
        "other/report.html": "<html><title>not a run</title></html>",
        "broken/report.html": '<meta name="raybge-run" content="{&quot;title&quot;: 3}">',
    }
    for number, (name, text) in enumerate(pages.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        os.utime(folder / name, (number, number))
    return folder


def test_every_run_is_linked(runs):
    text = (runs / write_index(str(runs)).rsplit("/", 1)[1]).read_text(encoding="utf-8")
    links = Links(text).targets
    assert {unquote(target): name for target, name in links.items()} == {
        "mine/report.html": "mine",
        "round 1/model #2/report.html": "round 1/model #2",
        "text/mined.jsonl.report.html": "text/mined.jsonl",
        "after.json.report.html": "after.json",
    }
    assert all((runs / unquote(target)).is_file() for target in links)
    shown = Page(text).text
    assert "4 runs in runs" in shown and "nDCG@10 0.4100 → 0.5500" in shown and "120 rows with 10 negatives" in shown
    assert "model plain" in shown and "data plain, b.jsonl" in shown and "not a run" not in shown


def test_runs_are_grouped_by_command_the_newest_first(runs):
    (runs / "later").mkdir()
    (runs / "later" / "report.html").write_text(raybge.training.page.html(training()), encoding="utf-8")
    targets = list(Links((runs / write_index(str(runs)).rsplit("/", 1)[1]).read_text()).targets)
    assert targets[:3] == ["later/report.html", "mine/report.html", "after.json.report.html"]
    assert targets[3:] == ["text/mined.jsonl.report.html", "round%201/model%20%232/report.html"]


def test_texts_of_pages_are_escaped(tmp_path):
    (tmp_path / "report.html").write_text(raybge.training.page.html(training(text=EVIL)), encoding="utf-8")
    assert_escaped((tmp_path / os.path.basename(write_index(str(tmp_path)))).read_text(encoding="utf-8"), 0)


def test_the_command_prints_the_page_or_the_error(runs, tmp_path, capsys):
    assert main([str(runs)]) == 0 and capsys.readouterr().out == f"{runs}/index.html\n"
    assert main([str(runs)]) == 0  # the index is not a run
    assert "4 runs" in (runs / "index.html").read_text()
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "no report.html of a run" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such folder"):
        write_index(str(tmp_path / "nowhere"))


def test_another_page_is_not_replaced(runs, tmp_path):
    folder = str(runs if not isinstance(runs, tuple) else runs[0])
    page = os.path.join(folder, "index.html")
    with open(page, "w") as file:
        file.write("<html>of a website</html>")
    with pytest.raises(UserError, match="index.html is another page: move it away"):
        write_index(folder)
    os.unlink(page)
    assert write_index(folder) == write_index(folder) == page
