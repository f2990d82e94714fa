"""What tests of pages share: a page as a tree, and one run of each kind as its report sees it."""

import math
import random
from collections import Counter
from html.parser import HTMLParser

from raybge.evaluation import mteb_page as tasks
from raybge.evaluation import page as evaluate
from raybge.evaluation.metric_changes import Change
from raybge.merging import page as merge
from raybge.merging.coefficient_search import Tasted
from raybge.mining import page as mine
from raybge.mining.statistics import Suspect, Tally
from raybge.report.run_details import Run
from raybge.training import page as train

EVIL = '<script>alert("1")</script>&\''
LONG = "a word of it " * 4000


class Page(HTMLParser):
    """The page as a tree would be: elements with classes, texts, and whether all that is opened is closed."""

    VOID = ("meta", "link", "wbr")

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def run(command, text="plain"):
    """`text` stands wherever texts of people's own come in."""
    flags = {"model_name_or_path": text, "learning_rate": 2e-5, "train_data": [text, "b.jsonl"], "fp16": True}
    return Run(command, flags, text, [(text, 1200), ("b.jsonl", None)], {"device": text}, {"torch": "2.13"})


def spans(number):
    return [
        train.Span(
            i + 1, i + 1, 0.4 + 3 * math.exp(-30 * i / number), 6, 2e-5 * (1 - i / number), 20.0 if not i else 0.5, 9
        )
        for i in range(number)
    ]


def training(number=30, text="plain", **more):
    rng = random.Random(0)
    scores = [
        train.BatchScores(step, *([rng.gauss(mean, 0.1) for _ in range(90)] for mean in means))
        for step, means in ((1, (0.6, 0.5, 0.2)), (number, (0.8, 0.4, 0.1)))
    ]
    hits = [train.Hit(text, False), train.Hit(text, True)]
    about = dict(
        run=run("train", text),
        spans=spans(number),
        evaluations=[(step, {"nDCG@10": 0.4 + step / 1000}) for step in (0, 10, 20, 30)],
        changes=[Change("nDCG@10", 0.41, 0.55, 0.12, 0.16, 50), Change("MRR@10", 0.35, 0.36, -0.01, 0.03, 50)],
        scores=scores,
        shown=[train.Shown(text, text, 0.1, 0.9, hits, hits[::-1], 2, 1), train.Shown(text, text, 0.5, 0.0)],
        workers=2,
        metrics={"train_runtime": 75.0, "train_samples_per_second": 12.5, "train_loss": 0.61, "epoch": 1.5},
    )
    return train.Training(**(about | more))


def mining(text="plain", **more):
    tally = Tally(
        rows=120,
        filled=9,
        short=3,
        positives=Counter({14: 30, 15: 70, 16: 20}),
        negatives=Counter({10: 300, 11: 700, 14: 90}),
        counts=Counter({10: 117, 4: 2, 0: 1}),
        ranks=Counter(dict.fromkeys(range(2, 52), 20)),
        compared=1000,
        above=23,
        suspects=[Suspect(text, text, text, 0.61, 0.78), Suspect(text, text, text, 0.6, 0.6)],
    )
    about = dict(
        run=run("mine", text),
        tally=tally,
        number=10,
        summary={"rows": 120, "passages": 300, "duplicates": 20, "bad_rows": 0},
        seconds={"encode": 61.0, "search": 2.0},
        sampling="10 negatives a row, random, from ranks 2 to 51, seed 42",
    )
    return mine.Mining(**(about | more))


def evaluation(text="plain", **more):
    names = [f"{kind}@{rank}" for kind in ("nDCG", "MRR") for rank in (1, 10, 100)]
    about = dict(
        run=run("evaluate", text),
        metrics={**{name: 0.5 + i / 100 for i, name in enumerate(names)}, "queries": 50, "corpus": 3000},
        per_query={name: [0, 0, 0.5, 1, 1] for name in names},
        comparison=[Change("nDCG@10", 0.41, 0.51, 0.05, 0.15, 50)],
        compared_with=text,
    )
    return evaluate.Evaluation(**(about | more))


def measurement(text="plain"):
    scores = {"ndcg_at_10": 0.61, "map_at_10": 0.5, "languages": ["eng-Latn"], "nauc_map_at_10_std": math.nan}
    parts = [("test", text, scores), ("dev", "default", scores)]
    made = [tasks.Task(text, kind, "ndcg_at_10", 0.61, parts, 75.0) for kind in ("Retrieval", "Retrieval", "STS")]
    return tasks.Measurement(run("evaluate", text), made)


def mixture(text="plain", **more):
    """The target is best at 0.8 of the first model, the general set at none of it; the floor asks for 0.84 or less."""
    steps = [i / 10 for i in range(10, -1, -1)]
    about = dict(
        run=run("merge", text),
        models=["tuned", "base"],
        weights=[0.6, 0.4],
        tasted=[Tasted((w, round(1 - w, 1)), 0.71 - 0.3 * (w - 0.8) ** 2, 0.63 - 0.05 * w) for w in steps],
        least=0.588,
        seconds=12.0,
    )
    return merge.Merging(**(about | more))
