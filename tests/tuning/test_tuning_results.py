"""The result of a finished search, as the Python function returns it."""

import json

from raybge import TuningResult


def test_the_result_is_read_from_the_output_folder(tmp_path):
    best = {"flags": {"learning_rate": 1e-5}, "metrics": {"nDCG@10": 0.5}, "command": "python -m raybge.train"}
    (tmp_path / "best.json").write_text(json.dumps(best))
    result = TuningResult.read(tmp_path)
    assert (result.flags, result.metrics, result.command) == (*best.values(),)
    paths = [str(tmp_path / name) for name in ("best", "trials.csv", "report.html")]
    assert [result.model, result.trials, result.report] == paths
