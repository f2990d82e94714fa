"""Each kind of page in headless Chromium: no errors, nothing loaded or cut, no violations found by axe-core.

Chromium is searched on the PATH, axe-core (https://github.com/dequelabs/axe-core) at AXE_CORE or where `make axe` puts
it. Without one of them, its tests are skipped.
"""

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from html import escape, unescape
from pathlib import Path

import pytest
from pages import LONG, demo, evaluation, merging, mining, mteb, training
from searches import SIX, search

import raybge.evaluation.mteb_page
import raybge.evaluation.page
import raybge.merging.page
import raybge.mining.page
import raybge.quickstart.page
import raybge.training.page
import raybge.tuning.page
from raybge.report.run_index import IndexedRun, index_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(os.environ.get("AXE_CORE") or Path(__file__).parents[2] / ".venv/axe/node_modules/axe-core/axe.min.js")
# Width and preferredColorScheme. A window has at least 500 pixels: a narrower page is in a frame.
MODES = {"large, light": (1400, "1"), "tablet, dark": (800, "0"), "phone, light": (360, "1"), "phone, dark": (360, "0")}
LEAST_WINDOW = 500
NOW = datetime(2026, 1, 2, 3, 4)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

# Writes its result into the page, which --dump-dom prints: loaded resources, axe-core's violations and what is cut.
SCRIPT = """addEventListener("load", async () => {
  const loaded = performance.getEntriesByType("resource").map((each) => each.name);
  const results = globalThis.axe ? await axe.run(document, {resultTypes: ["violations"]}) : {violations: []};
  const violations = results.violations.map(
    (each) => [each.id, each.help, each.nodes.slice(0, 3).map((node) => node.html.slice(0, 200))]);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const ends = (element) => element.getBoundingClientRect().right;
  const outside = [...document.querySelectorAll("body *")].filter(
    (each) => ends(each) > innerWidth + 1 && !each.parentElement.closest("svg, .scroll, pre"));
  const scrolling = [...document.querySelectorAll(".scroll, .chart")].filter(
    (each) => each.scrollWidth > each.clientWidth + 1);
  const cut = [...outside, ...scrolling].map((each) => each.textContent.trim().slice(0, 40));
  top.document.documentElement.dataset.result = JSON.stringify([loaded, violations, dark, innerWidth, cut]);
});"""


def pages():
    return {
        "train": raybge.training.page.html(training()),
        "train-long": raybge.training.page.html(training(3000, LONG[:2000])),
        "mine": raybge.mining.page.html(mining()),
        "merge": raybge.merging.page.html(merging()),
        "evaluate": raybge.evaluation.page.html(evaluation()),
        "mteb": raybge.evaluation.mteb_page.html(mteb()),
        "tune": raybge.tuning.page.html(search(SIX)),
        "demo": raybge.quickstart.page.html(demo()),
        "runs": index_html("runs", [IndexedRun(training().run.head("nDCG@10 0.5"), "a", "a/report.html", NOW)]),
    }


def open_page(path: Path, mode: str) -> tuple[str, str]:
    """Return the page's elements once it is idle, and Chromium's log."""
    width, scheme = MODES[mode]
    if width < LEAST_WINDOW:
        content = escape(path.read_text(encoding="utf-8"))
        path = path.with_name(f"{path.stem}-{mode}.html")
        frame = f'<iframe title="page" style="width:{width}px;height:900px;border:0" srcdoc="{content}"></iframe>'
        path.write_text(f'<!doctype html><html lang="en"><body>{frame}</body></html>', encoding="utf-8")
    process = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"),
            f"--window-size={max(width, LEAST_WINDOW)},900",
            *(f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={path.parent / (path.stem + mode)}"),
            *("--virtual-time-budget=20000", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return process.stdout, process.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, str], tuple[list, list, list, list[str]]]:
    """Loaded resources, violations, what is cut, and console messages of each page in each mode."""
    folder = tmp_path_factory.mktemp("pages")
    axe = AXE.read_text(encoding="utf-8") if AXE.is_file() else ""
    documents = pages()
    for name, page in documents.items():
        page = page.replace("</body>", f"<script>{axe}</script><script>{SCRIPT}</script></body>")
        (folder / f"{name}.html").write_text(page, encoding="utf-8")

    def check(case: tuple[str, str]) -> tuple[list, list, list, list[str]]:
        name, mode = case
        dom, log = open_page(folder / f"{name}.html", mode)
        result = re.search(r'<html[^>]* data-result="([^"]*)"', dom)
        assert result, f"{name}, {mode}: the script did not end\n{log[-2000:]}"
        loaded, violations, dark, width, cut = json.loads(unescape(result[1]))
        assert (dark, width) == ("dark" in mode, MODES[mode][0])
        return loaded, violations, cut, re.findall(r"CONSOLE.*", log)

    cases = [(name, mode) for name in documents for mode in MODES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(check, cases), strict=True))


def test_pages_have_no_errors_and_load_nothing(results):
    assert {case: (loaded, log) for case, (loaded, _, _, log) in results.items() if loaded or log} == {}


def test_nothing_is_cut(results):
    """The table of a search's trials, with a column for each flag, scrolls by itself."""
    cut = {case: texts for case, (_, _, texts, _) in results.items() if texts}
    assert {case: texts for case, texts in cut.items() if case[0] != "tune"} == {}
    assert all(len(texts) == 1 and texts[0].startswith("trialstatus") for texts in cut.values())


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed: `make axe`, or AXE_CORE=axe.min.js")
def test_pages_are_accessible(results):
    assert {case: violations for case, (_, violations, _, _) in results.items() if violations} == {}
