"""Each kind of page in headless Chromium: no error, nothing loaded, and no fault that axe-core finds.

Chromium is looked for on the PATH, axe-core (https://github.com/dequelabs/axe-core) at AXE_CORE, or where `make axe`
puts it. Where one of them is absent, its tests are skipped.
"""

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path

import pytest
from pages import LONG, evaluation, measurement, mining, mixture, training
from searches import SIX, search

from raybge.evaluation import mteb_page as tasks
from raybge.evaluation import page as evaluate
from raybge.merging import page as merge
from raybge.mining import page as mine
from raybge.training import page as train
from raybge.tuning import page as tune

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(os.environ.get("AXE_CORE") or Path(__file__).parents[2] / ".venv/axe/node_modules/axe-core/axe.min.js")
# size, of which Chromium takes no width below 500, and its preferredColorScheme
LOOKS = {"light": ("1200,900", "1"), "dark": ("500,900", "0")}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

# Written into the page itself, where --dump-dom finds it again: what it loaded, and the faults that axe-core finds.
SCRIPT = """addEventListener("load", async () => {
  const loaded = performance.getEntriesByType("resource").map((each) => each.name);
  const found = globalThis.axe ? await axe.run(document, {resultTypes: ["violations"]}) : {violations: []};
  const faults = found.violations.map(
    (each) => [each.id, each.help, each.nodes.slice(0, 3).map((node) => node.html.slice(0, 200))]);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.said = JSON.stringify([loaded, faults, dark, innerWidth]);
});"""


def pages():
    return {
        "train": train.html(training()),
        "train-long": train.html(training(3000, LONG[:2000])),
        "mine": mine.html(mining()),
        "merge": merge.html(mixture()),
        "evaluate": evaluate.html(evaluation()),
        "tasks": tasks.html(measurement()),
        "tune": tune.html(search(SIX)),
    }


def opened(path: Path, look: str) -> tuple[str, str]:
    """The page's elements as text, once it is idle, and what Chromium wrote of it."""
    size, scheme = LOOKS[look]
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", f"--window-size={size}"),
            *(f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={path.parent / (path.stem + look)}"),
            *("--virtual-time-budget=20000", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[str, str], tuple[list, list, list[str]]]:
    """What each page loads in each look, its faults, and the messages of its console."""
    folder = tmp_path_factory.mktemp("pages")
    axe = AXE.read_text(encoding="utf-8") if AXE.is_file() else ""
    every = pages()
    for name, page in every.items():
        page = page.replace("</body>", f"<script>{axe}</script><script>{SCRIPT}</script></body>")
        (folder / f"{name}.html").write_text(page, encoding="utf-8")

    def one(asked: tuple[str, str]) -> tuple[list, list, list[str]]:
        name, look = asked
        dom, log = opened(folder / f"{name}.html", look)
        said = re.search(r'<html[^>]* data-said="([^"]*)"', dom)
        assert said, f"{name}, {look}: the script did not end\n{log[-2000:]}"
        loaded, faults, dark, width = json.loads(unescape(said[1]))
        assert (dark, width) == (look == "dark", int(LOOKS[look][0].split(",")[0]))
        return loaded, faults, re.findall(r"CONSOLE.*", log)

    asked = [(name, look) for name in every for look in LOOKS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(asked, pool.map(one, asked), strict=True))


def test_pages_have_no_error_and_load_nothing(found):
    assert {asked: (loaded, log) for asked, (loaded, _, log) in found.items() if loaded or log} == {}


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not there: `make axe`, or AXE_CORE=axe.min.js")
def test_pages_are_accessible(found):
    assert {asked: faults for asked, (_, faults, _) in found.items() if faults} == {}
