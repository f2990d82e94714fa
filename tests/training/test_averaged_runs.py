"""Runs with averaged weights from their flags to their files, for any number of workers, and continued."""

import json
from pathlib import Path

import pytest
from faulty_runs import assert_same_model, full_disk_after_step, make_flags
from safetensors.numpy import load_file
from tiny import make_tiny

from raybge.evaluation.weight_versions import WEIGHT_VERSIONS
from raybge.train import finetune
from raybge.training.checkpoint.manifest import latest_checkpoint

AVERAGES = {"ema": 0.8, "average_checkpoints": 2}


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("inputs")
    return make_flags(folder) | {"model_name_or_path": make_tiny(folder / "without", dropout=0.0)}


def evaluated(flags: dict) -> dict:
    return {"eval_data": flags["train_data"], "keep_better": True, **AVERAGES}


def test_a_run_reports_each_version_of_its_weights(worker_processes, flags, tmp_path, capfd):
    result = finetune(**flags, **evaluated(flags), output_dir=str(tmp_path / "out"))
    names = [version.name for version in result.versions]
    assert names == ["last", "EMA 0.8", "mean of 2 checkpoints"]
    values = [{change.metric: change for change in version.changes}["nDCG@10"] for version in result.versions]
    (saved,) = [version for version in result.versions if version.saved]
    assert result.metrics["eval_nDCG@10"] == max(value.after for value in values)
    assert values[names.index(saved.name)].after == result.metrics["eval_nDCG@10"]
    assert all(value.low <= value.difference <= value.high and value.queries == 16 for value in values)
    assert all(isinstance(value, int | float) for value in result.metrics.values())
    screen = capfd.readouterr().out
    assert "weights: the last ones or their exponential moving average (decay 0.8)" in screen
    files = {name: (tmp_path / "out" / name).read_text() for name in ("README.md", "report.html")}
    for text in (screen, *files.values()):
        assert f"{saved.name} (saved)" in text and "difference from the last" in text
    recorded = json.loads((tmp_path / "out" / "train_results.json").read_text())[WEIGHT_VERSIONS]
    assert [each["weights"] for each in recorded] == names


@pytest.mark.parametrize("average", AVERAGES)
def test_averages_do_not_depend_on_the_workers(worker_processes, flags, tmp_path, average):
    """One worker, two, three of which one has no group at the end; the same run twice has the same bytes.

    With SGD: Adam makes steps of full size of gradients that are nothing but the order of sums in fp32.
    """
    flags = flags | {"optim": "sgd", "learning_rate": 0.3}
    outputs = []
    for workers in ("1", "2", "3", "3"):
        outputs.append(tmp_path / str(len(outputs)))
        finetune(**flags | {"num_workers": workers, average: AVERAGES[average], "output_dir": str(outputs[-1])})
    for output in outputs[1:]:
        assert_same_model(output, outputs[0])
    first, second = ((output / "model.safetensors").read_bytes() for output in outputs[2:])
    assert first == second
    plain = tmp_path / "plain"
    finetune(**flags, output_dir=str(plain))
    last, averaged = (load_file(folder / "model.safetensors") for folder in (plain, outputs[1]))
    assert any(abs(last[name] - averaged[name]).max() > 1e-4 for name in last)


def test_a_continued_run_has_the_same_averages(worker_processes, flags, tmp_path):
    """Lost in the middle of the second epoch, with dropout, and continued by another number of checkpoints kept."""
    flags = flags | {"model_name_or_path": make_tiny(tmp_path / "dropout", dropout=0.1)}
    outputs = [tmp_path / "whole", tmp_path / "lost"]
    finetune(**flags, **evaluated(flags), output_dir=str(outputs[0]))

    with full_disk_after_step(5):
        finetune(**flags, **evaluated(flags), output_dir=str(outputs[1]))
    assert latest_checkpoint(outputs[1]).step == 4
    finetune(**flags, **evaluated(flags), output_dir=str(outputs[1]), resume=True)
    first, second = (load(output) for output in outputs)
    assert first == second
    assert_same_model(*outputs)


def load(output: Path) -> list:
    return json.loads((output / "train_results.json").read_text())[WEIGHT_VERSIONS]
