"""Records of trials: ranking, the best trial, and the CSV and JSON files."""

import csv
import json
import math

import pytest

from raybge.tuning.records import Trial, best_trial, ranked_trials, write_csv, write_json
from raybge.tuning.search_space import Domain
from raybge.util.errors import UserError

SPACE = {"learning_rate": Domain("loguniform", (1e-6, 1e-4)), "seed": Domain("choice", (1, 2))}


def trial(number, score=None, status="finished", **flags):
    """Return a trial with `score` at step 20."""
    curve = [] if score is None else [(10, score / 2), (20, score)]
    metrics = {} if score is None else {"nDCG@10": score, "MRR@10": score / 2}
    return Trial(number, flags or {"learning_rate": 1e-5, "seed": 1}, status, curve, metrics, 1.5)


@pytest.mark.parametrize(("mode", "order"), [("max", [2, 0, 3, 1, 4]), ("min", [1, 0, 3, 2, 4])])
def test_ranking(mode, order):
    """Equal trials are ranked by number, those without the metric last."""
    trials = [trial(4), trial(3, 0.5), trial(2, 0.7), trial(1, -0.2), trial(0, 0.5)]
    assert [t.number for t in ranked_trials(trials, "nDCG@10", mode)] == order
    assert best_trial(trials, "nDCG@10", mode).number == order[0]


def test_finished_trials_come_before_stopped_ones():
    trials = [trial(0, 0.9, "stopped"), trial(1, 0.5), trial(2, 0.6, "failed"), trial(3, 0.8, "running")]
    assert best_trial(trials, "nDCG@10", "max").number == 1
    assert best_trial([trials[3], trials[0]], "nDCG@10", "max").number == 0


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_no_best_trial_without_the_metric(score):
    assert best_trial([trial(0, score, "failed")], "nDCG@10", "max") is None
    assert best_trial([], "nDCG@10", "max") is None
    assert best_trial([trial(0, 0.5)], "MAP@10", "max") is None
    assert best_trial([trial(0, score), trial(1, 0.1)], "nDCG@10", "max").number == 1


def test_zero_is_a_valid_metric():
    assert best_trial([trial(1, 0.0), trial(0)], "nDCG@10", "max").number == 1
    assert trial(0, 0.0).score("nDCG@10") == 0.0


def test_steps():
    assert (trial(0, 0.5).steps, trial(0).steps) == (20, 0)


ODD = 'a, "b"\nc; naïve 查询'


def test_csv_contains_every_trial(tmp_path):
    path = tmp_path / "trials.csv"
    trials = [
        trial(1, 0.25, learning_rate=2e-5, seed=2),
        Trial(0, {"seed": 1, "lora_rank": 8}, "failed", [], {}, 2, ODD),
    ]
    write_csv(str(path), trials, SPACE)
    head, *rows = csv.reader(path.open(encoding="utf-8", newline=""))
    assert head == "number status learning_rate seed lora_rank nDCG@10 MRR@10 steps seconds error".split()
    assert rows == [
        ["0", "failed", "", "1", "8", "", "", "0", "2", ODD],
        ["1", "finished", "2e-05", "2", "", "0.25", "0.125", "20", "1.5", ""],
    ]


def test_numbers_are_written_exactly(tmp_path):
    rate = 3.0000000000000004e-05
    write_csv(str(tmp_path / "t.csv"), [trial(0, 1 / 3, learning_rate=rate)], SPACE)
    write_json(str(tmp_path / "t.json"), [trial(0, 1 / 3, learning_rate=rate)], SPACE)
    (row,) = csv.DictReader((tmp_path / "t.csv").open())
    (record,) = json.loads((tmp_path / "t.json").read_text())["trials"]
    assert (float(row["learning_rate"]), float(row["nDCG@10"])) == (rate, 1 / 3)
    assert (record["flags"]["learning_rate"], record["metrics"]["nDCG@10"]) == (rate, 1 / 3)


def test_json_contains_every_trial_and_the_space(tmp_path):
    path = tmp_path / "trials.json"
    nan = Trial(
        0, {"seed": 1}, "failed", [(0, 0.5), (9, math.nan)], {"nDCG@10": math.inf}, 2.0, ODD, history=[(0, {"seed": 1})]
    )
    write_json(str(path), [trial(1, 0.5), nan], SPACE)
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert content["space"] == {"learning_rate": "loguniform(1e-6,0.0001)", "seed": "choice(1,2)"}
    assert [t["number"] for t in content["trials"]] == [0, 1]
    assert content["trials"][0] == {
        "number": 0,
        "flags": {"seed": 1},
        "status": "failed",
        "curve": [[0, 0.5], [9, None]],
        "metrics": {"nDCG@10": None},
        "seconds": 2.0,
        "error": ODD,
        "id": "",
        "history": [[0, {"seed": 1}]],
    }
    assert content["trials"][1]["curve"] == [[10, 0.25], [20, 0.5]]


@pytest.mark.parametrize("write", [write_csv, write_json])
def test_failed_writing_keeps_the_old_file(tmp_path, write):
    path = tmp_path / "trials"
    write(str(path), [trial(0, 0.5)], SPACE)
    before = path.read_bytes()
    broken = Trial(1, {"seed": "\ud800"}, "failed", [], {}, 1.0)  # not encodable as UTF-8
    with pytest.raises(UnicodeEncodeError):
        write(str(path), [broken], SPACE)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match=r"--output_dir: .* cannot be written"):
        write(str(path / "trials"), [], SPACE)
