"""Shared by tests of tuning: the content of a page, and access to the elements of its charts."""

from raybge.tuning.page import TuningReport
from raybge.tuning.records import Trial
from raybge.tuning.search_space import Domain
from raybge.tuning.trial_charts import TrialView

METRIC = "nDCG@10"
SPACE = {
    "learning_rate": Domain("loguniform", (1e-6, 1e-4)),
    "lr_scheduler_type": Domain("choice", ("linear", "cosine")),
}


def trial(number, score=None, status="finished", begin=0.4, **flags):
    flags = {"learning_rate": 2e-5, "lr_scheduler_type": "linear", **flags}
    curve = [] if score is None else [(0, begin), (10, (begin + score) / 2), (20, score)]
    metrics = {} if score is None else {METRIC: score}
    return Trial(number, flags, status, curve, metrics, 12.5, "out of memory" if status == "failed" else None)


def search(trials, space=SPACE, mode="max", **more):
    command = ["python", "-m", "raybge.tune", "--metric", METRIC]
    best_commands = [["python", "-m", "raybge.train", "--seed", "1"]]
    return TuningReport(command, METRIC, mode, space, trials, best_commands, **more)


SIX = [
    trial(0, 0.60),
    trial(1, 0.65, learning_rate=5e-5),
    trial(2, 0.55, "stopped"),
    trial(3, None, "failed", learning_rate=9e-5),
    trial(4, 0.58, lr_scheduler_type="cosine"),
    trial(5, 0.50, "running"),
]


def of_class(drawing, *names):
    return [each for each in drawing.iter() if set(names) <= set((each.get("class") or "").split())]


def numbers_of(drawing, *names):
    return [int(each.get("data-t")) for each in of_class(drawing, *names) if each.get("data-t")]


def view(trials, mode="max", space=SPACE):
    return TrialView(trials, METRIC, mode, space)
