"""The call path from the flags to the loss: docs/architecture.md lists it, at most nine files long."""

import json
import re
import sys
from pathlib import Path

from faulty_runs import make_flags, to_argv

import raybge
from raybge.train import main
from raybge.training import controller, worker

ROOT = Path(raybge.__file__).parents[1]
CONTROLLER, LOSS = "raybge/training/controller.py", "raybge/losses/functional.py"
MOST_FILES = 9


class Tracer:
    """Records, in one thread, the files of raybge in the order of their first call, and the call stack at `last`."""

    def __init__(self, root: str, last: str) -> None:
        self.root, self.last = root, last
        self.entered: list[str] = []
        self.stack: list[str] = []

    def __call__(self, frame, event, argument) -> None:
        if event != "call" or not (name := self.file_of(frame)):
            return
        builds = frame.f_code.co_name in ("__init__", "__post_init__")  # objects are built before they are used
        if name not in self.entered and not builds:
            self.entered.append(name)
        if name == self.last and not self.stack:
            frames = []
            while frame is not None:
                frames.insert(0, self.file_of(frame))
                frame = frame.f_back
            self.stack = list(dict.fromkeys(filter(None, frames)))  # each where it is first entered

    def file_of(self, frame) -> str | None:
        code = frame.f_code
        is_module = code.co_name == "<module>"  # an import is no call
        if is_module or not code.co_filename.startswith(f"{self.root}/raybge/"):
            return None
        if code.co_filename.startswith(f"{self.root}/raybge/compat/"):  # part of a library's own loop
            return None
        return code.co_filename.removeprefix(f"{self.root}/")


def documented_path() -> list[str]:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.partition("<!-- call path -->")[2].partition("<!-- end of call path -->")[0]
    return re.findall(r"^\d+\. `(raybge/.*\.py)`$", section, re.MULTILINE)


def test_the_documented_path_is_the_traced_one(worker_processes, tmp_path, monkeypatch):
    record, root = tmp_path / "worker.json", str(ROOT)

    def traced(settings: dict) -> None:
        tracer = Tracer(root, LOSS)
        sys.setprofile(tracer)
        try:
            worker.train_worker(settings)
        finally:
            sys.setprofile(None)
        record.write_text(json.dumps([tracer.entered, tracer.stack]))

    monkeypatch.setattr(controller, "_train_worker", traced)
    driver = Tracer(root, CONTROLLER)
    flags = {**make_flags(tmp_path), "output_dir": str(tmp_path / "run"), "num_workers": "1", "max_steps": 1}
    sys.setprofile(driver)
    try:
        code = main(to_argv(flags))
    finally:
        sys.setprofile(None)
    assert code == 0

    entered, stack = json.loads(record.read_text())
    path = documented_path()
    traced_path = [*driver.stack, *(name for name in stack if name not in driver.stack)]
    assert traced_path == path
    assert len(path) <= MOST_FILES
    # The same order when the files are listed by their first call, with all others between them.
    first_calls = [*driver.entered, *(name for name in entered if name not in driver.entered)]
    assert [name for name in first_calls if name in path] == path
