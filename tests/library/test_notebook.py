"""The Python functions in a Jupyter kernel: their lines are output of the cell, and the kernel stays as it was."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from tiny import make_tiny

SETUP = """
import os, signal
import raybge
flags = dict(
    model_name_or_path="model",
    input_file="groups.jsonl",
    range_for_sampling="0-10",
    negative_number=2,
    num_workers="1",
    cpus_per_worker=1,
    overwrite=True,
)
before = [os.fstat(1).st_ino, os.fstat(2).st_ino, signal.getsignal(signal.SIGTERM), dict(os.environ)]
"""
MINE = "raybge.mine_hard_negatives(output_file='mined.jsonl', **flags)"
FAIL = """
try:
    raybge.mine_hard_negatives(output_file="mined.jsonl", **{**flags, "input_file": "missing.jsonl"})
except Exception as error:
    print(type(error).__name__, "raised")
"""
CHECK = """
after = [os.fstat(1).st_ino, os.fstat(2).st_ino, signal.getsignal(signal.SIGTERM), dict(os.environ)]
print("unchanged" if before == after else "changed")
"""
EXECUTE = """
import os, sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": os.path.dirname(sys.argv[1])}}).execute()
nbformat.write(notebook, sys.argv[1])
"""


@pytest.mark.alone  # the kernel starts a Ray of its own
def test_functions_in_a_notebook(tmp_path: Path):
    make_tiny(tmp_path / "model")
    texts = [f"a lane of row {i} on node {i * i}" for i in range(16)]
    groups = [{"query": text[:9], "pos": [text], "neg": []} for text in texts]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, MINE, FAIL, MINE, CHECK)]
    path = tmp_path / "mine.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    # The kernel's client has a process of its own: the messages between the two arrive in threads of ZeroMQ's.
    subprocess.run([sys.executable, "-c", EXECUTE, path], check=True, timeout=300)
    notebook = nbformat.read(path, as_version=4)
    text = ["".join(each.get("text", "") for each in cell.outputs) for cell in notebook.cells]
    assert "mine" in text[1] and "16" in text[1]
    assert "UserError raised" in text[2]
    assert "16" in text[3] and text[4] == "unchanged\n"
    assert len((tmp_path / "mined.jsonl").read_text().splitlines()) == 16
