"""Small runs equal the recorded reference values: steps, losses, gradients, weights, mined passages and metrics.

A change of the order of rows, of a sign, margin, temperature or mask of the loss, of pooling or of ranking exceeds the
tolerance, which allows for the rounding of another processor. After an intended change, run
`python benchmarks/golden.py record .` to write tests/golden.json again.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from process_runtime import use_processes

import raybge

REFERENCE = json.loads(Path(__file__).with_name("golden.json").read_text())
BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
RELATIVE = 1e-3
EQUAL_PASSAGES = 0.98  # two passages with nearly equal scores may swap their ranks
METRIC_TOLERANCE = 0.01  # likewise


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Any) -> dict:
    """The values of this checkout."""
    functions = {
        "train": raybge.finetune,
        "mine": raybge.mine_hard_negatives,
        "evaluate": raybge.evaluate_retrieval,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        golden = importlib.import_module("golden")
    try:
        folder = tmp_path_factory.mktemp("golden") / "values"
        with use_processes():
            return golden.reference_values(folder, lambda command, flags: functions[command](**flags))
    finally:
        for name in [name for name in sys.modules if name.startswith("golden")]:
            del sys.modules[name]


@pytest.mark.parametrize("run", ["train", "train-options"])
@pytest.mark.parametrize("series", ["loss", "grad_norm"])
def test_losses_and_gradient_norms_of_each_step(values, run, series):
    assert values[run][series] == pytest.approx(REFERENCE[run][series], rel=RELATIVE)


@pytest.mark.parametrize("run", ["train", "train-options"])
def test_changes_of_weights(values, run):
    assert values[run]["change"] == pytest.approx(REFERENCE[run]["change"], rel=RELATIVE)


def test_mined_passages(values):
    mined, reference = np.array(values["mined"]), np.array(REFERENCE["mined"])
    assert mined.shape == reference.shape
    assert (mined == reference).mean() >= EQUAL_PASSAGES


def test_metrics(values):
    assert values["metrics"].keys() == REFERENCE["metrics"].keys()
    assert values["metrics"] == pytest.approx(REFERENCE["metrics"], abs=METRIC_TOLERANCE)
