"""Metrics before and after training: one set of numbers on the screen, in the results, the card and the report."""

import json

import numpy as np
import pytest
from pages import Page
from tiny import make_tiny

import raybge
from raybge.evaluation.metric_changes import MetricChange, changes_in, to_json, training_changes
from raybge.evaluation.query_examples import RetrievalResult


def test_all_results_of_a_run_show_the_same_changes(worker_processes, tmp_path, capfd):
    rows = [{"query": f"row {i}", "pos": [f"block {i} of the text"], "neg": [f"lane {i}"]} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "run"
    result = raybge.finetune(
        model_name_or_path=make_tiny(tmp_path / "tiny"),
        train_data=[str(tmp_path / "rows.jsonl")],
        eval_data=[str(tmp_path / "rows.jsonl")],
        output_dir=str(output),
        max_steps=2,
        learning_rate=0.1,
        train_group_size=2,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        num_workers="1",
        cpus_per_worker=1,
    )
    screen = capfd.readouterr().out
    changes = result.changes
    assert [change.metric for change in changes] == ["nDCG@10", "MRR@10"]
    card, page = (output / "README.md").read_text(), Page((output / "report.html").read_text()).text
    written = json.loads((output / "train_results.json").read_text())
    assert changes_in(written) == list(changes) and result.metrics.items() <= written.items()
    for change in changes:
        assert change.low <= change.difference <= change.high and change.queries == 12
        assert change.after == pytest.approx(result.metrics[f"eval_{change.metric}"])
        texts = change.texts
        assert f"| {' | '.join(texts)} |" in card and "".join(texts) in page
        assert any(line.split("  ")[0] == change.metric and line.endswith(texts[-1]) and texts[4] in line
                   for line in screen.splitlines())  # fmt: skip
        assert f"{change.metric} {texts[1]}" in next(line for line in screen.splitlines() if "before training" in line)
    assert [line.split(":")[0] for line in screen.splitlines() if line.startswith("step ")] == [
        "step 1 of 2",
        "step 2 of 2",
    ]


def test_json_holds_everything():
    changes = [MetricChange("nDCG@10", 0.4, 0.5, 0.05, 0.15, 50), MetricChange("MRR@10", None, 0.3)]
    results = {"metric_changes": json.loads(json.dumps(to_json(changes)))}
    assert changes_in(results) == changes and changes_in({}) == []
    assert results["metric_changes"]["nDCG@10"]["difference"] == pytest.approx(0.1)
    assert results["metric_changes"]["MRR@10"]["difference"] is None


def test_means_are_compared_if_another_process_measured_the_queries():
    last = RetrievalResult({"nDCG@10": np.ones(4)}, np.zeros((4, 10), int))
    (change,) = training_changes(None, last, {"nDCG@10": 0.5}, {"nDCG@10": 1.0})
    assert change == MetricChange("nDCG@10", 0.5, 1.0)
    (paired,) = training_changes(RetrievalResult({"nDCG@10": np.zeros(4)}, last.ids_QK), last, {}, {})
    assert (paired.before, paired.after, paired.low, paired.high, paired.queries) == (0, 1, 1, 1, 4)
