"""Shared by tests of pages: an HTML parser, and the content of one page of each kind."""

import math
import random
from collections import Counter
from html.parser import HTMLParser

from raybge.evaluation.metric_changes import MetricChange
from raybge.evaluation.mteb_page import MtebReport, MtebTask
from raybge.evaluation.page import EvaluationReport
from raybge.evaluation.query_examples import PassageHit, QueryExample
from raybge.evaluation.ranking_examples import RankingExamples
from raybge.merging.page import MergingReport
from raybge.merging.weight_search import MergeCandidate
from raybge.mining.page import MiningReport
from raybge.mining.statistics import LikelyFalseNegative, MiningStatistics
from raybge.quickstart.page import DemoReport
from raybge.report.run_details import RunDetails
from raybge.training.measurements import BatchScores, UpdateSpan
from raybge.training.page import TrainingReport

EVIL = '<script>alert("1")</script>&\''
LONG = "a word of it " * 4000


class Page(HTMLParser):
    """Parsed page: its elements (tag, attributes) and its visible text; every element must be closed."""

    VOID = ("meta", "link", "wbr")

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def assert_escaped(html, occurrences):
    """The page contains EVIL as text so often, and neither a script nor an event handler besides its own script."""
    assert html.count("<script>") == 1
    page = Page(html)
    assert page.text.count(EVIL) >= occurrences
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def run(command, text="plain"):
    """Details of a run; `text` takes the place of every free text."""
    flags = {"model_name_or_path": text, "learning_rate": 2e-5, "train_data": [text, "b.jsonl"], "fp16": True}
    flags["output_dir"] = f"runs/{text}"
    return RunDetails(command, flags, text, [(text, 1200), ("b.jsonl", None)], {"device": text}, {"torch": "2.13"})


def spans(number):
    return [
        UpdateSpan(
            *(i + 1, i + 1, 0.4 + 3 * math.exp(-30 * i / number), 6, 2e-5 * (1 - i / number)),
            *(20.0 if not i else 0.5, 9, 1 + 9 / (i + 1)),
        )
        for i in range(number)
    ]


def training(number=30, text="plain", **more):
    rng = random.Random(0)
    scores = [
        BatchScores(step, *([rng.gauss(mean, 0.1) for _ in range(90)] for mean in means))
        for step, means in ((1, (0.6, 0.5, 0.2)), (number, (0.8, 0.4, 0.1)))
    ]
    hits = [PassageHit(text, False), PassageHit(text, True)]
    fields = dict(
        run=run("train", text),
        spans=spans(number),
        evaluations=[(step, {"nDCG@10": 0.4 + step / 1000}) for step in (0, 10, 20, 30)],
        changes=[
            MetricChange("nDCG@10", 0.41, 0.55, 0.12, 0.16, 50),
            MetricChange("MRR@10", 0.35, 0.36, -0.01, 0.03, 50),
        ],
        scores=scores,
        examples=[QueryExample(text, text, 0.1, 0.9, hits, hits[::-1], 2, 1), QueryExample(text, text, 0.5, 0.0)],
        workers=2,
        metrics={"train_runtime": 75.0, "train_samples_per_second": 12.5, "train_loss": 0.61, "epoch": 1.5},
    )
    return TrainingReport(**(fields | more))


def mining(text="plain", **more):
    statistics = MiningStatistics(
        rows=120,
        rows_filled=9,
        rows_with_fewer=3,
        positives=Counter({14: 30, 15: 70, 16: 20}),
        negatives=Counter({10: 300, 11: 700, 14: 90}),
        counts=Counter({10: 117, 4: 2, 0: 1}),
        ranks=Counter(dict.fromkeys(range(2, 52), 20)),
        above_by_row=Counter({(0, 10): 80, (1, 10): 17, (2, 10): 3}),
        false_negatives=[
            LikelyFalseNegative(text, text, text, 0.61, 0.78),
            LikelyFalseNegative(text, text, text, 0.6, 0.6),
        ],
    )
    fields = dict(
        run=run("mine", text),
        statistics=statistics,
        number=10,
        summary={"rows": 120, "passages": 300, "duplicates": 20, "bad_rows": 0},
        seconds={"encode": 61.0, "search": 2.0},
        sampling="10 negatives a row, random, from ranks 2 to 51, seed 42",
    )
    return MiningReport(**(fields | more))


def evaluation(text="plain", **more):
    kinds = ("nDCG", "Recall", "MAP", "Precision", "HitRate", "RecallCap", "MRR")
    names = [*(f"{kind}@{rank}" for kind in kinds for rank in (1, 10, 100)), "AUC@100"]
    hits = [PassageHit(text, False), PassageHit(text, True)]
    fields = dict(
        run=run("evaluate", text),
        metrics={**{name: 0.5 + i / 100 for i, name in enumerate(names)}, "queries": 50, "corpus": 3000},
        per_query={name: [0, 0, 0.5, 1, 1] for name in names},
        comparison=[MetricChange("nDCG@10", 0.41, 0.51, 0.05, 0.15, 50)],
        compared_with=text,
        examples=RankingExamples(
            "nDCG@10",
            [QueryExample(text, text, None, 0.0, (), hits), QueryExample(text, text, None, 0.4, (), hits, None, 2)],
            [QueryExample(text, text, 0.0, 0.9, hits[::-1], hits, None, 1)],
        ),
    )
    return EvaluationReport(**(fields | more))


def mteb(text="plain"):
    scores = {"ndcg_at_10": 0.61, "map_at_10": 0.5, "languages": ["eng-Latn"], "nauc_map_at_10_std": math.nan}
    parts = [("test", text, scores), ("dev", "default", scores)]
    tasks = [MtebTask(text, kind, "ndcg_at_10", 0.61, parts, 75.0) for kind in ("Retrieval", "Retrieval", "STS")]
    return MtebReport(run("evaluate", text), tasks)


def merging(text="plain", **more):
    """A search: the target is best at 0.8 of the first model, the general set at 0; the threshold allows up to 0.84."""
    weights = [i / 10 for i in range(10, -1, -1)]
    fields = dict(
        run=run("merge", text),
        models=["tuned", "base"],
        weights=[0.6, 0.4],
        candidates=[
            MergeCandidate((w, round(1 - w, 1)), 0.71 - 0.3 * (w - 0.8) ** 2, 0.63 - 0.05 * w) for w in weights
        ],
        general_threshold=0.588,
        seconds=12.0,
    )
    return MergingReport(**(fields | more))


def demo(text="plain"):
    return DemoReport(
        run("demo", text),
        [MetricChange("nDCG@10", 0.4, 0.5), MetricChange("MRR@10", 0.3, None)],
        {"mine": 61.0},
        {text: 1200},
        [(text, f"model/{text}.html")],
    )
