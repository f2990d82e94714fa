"""Report page of training, for complete, empty and unusual measurements."""

import math
import re

import pytest
from pages import EVIL, LONG, Page, assert_escaped, run, spans, training

from raybge.evaluation.metric_changes import MetricChange
from raybge.evaluation.query_examples import PassageHit, QueryExample
from raybge.evaluation.weight_versions import WeightVersion
from raybge.report.run_details import RunDetails
from raybge.training.measurements import BatchScores, NegativeCounts, UpdateSpan
from raybge.training.page import TrainingReport, html, write


def test_page_shows_all_measurements():
    page = Page(html(training()))
    assert "nDCG@10 0.4100 → 0.5500" in page.text
    assert "30 steps" in page.text and "1 min 15 s of training" in page.text and "2 workers" in page.text
    assert "groups per second12.5" in page.text and "epochs1.5" in page.text and "median step time0.5 s" in page.text
    assert "+0.1400+0.1200 to +0.1600better" in page.text and "-0.0100 to +0.0300not significant" in page.text
    assert "Held-out queries of --eval_data: 50" in page.text and "Tokens are those of one of 2 workers" in page.text
    assert "first relevant passage: rank 2 → rank 1" in page.text and "not in top 10 → not in top 10" in page.text
    assert "Step 1" in page.text and "Step 30" in page.text and "b.jsonl–" in page.text and "plain1,200" in page.text
    assert page.text.count("✓ plain") == 2
    titles = re.findall(r'aria-label="(.*?)"', html(training()))
    for name in ("loss", "gradient norm", "learning rate", "seconds per step", "tokens per second", "nDCG@10", "score"):
        assert any(title.startswith(name) for title in titles)
    assert "resumed" not in page.text


def test_page_of_a_resumed_run():
    page = Page(html(training(start=20, changes=[MetricChange("nDCG@10", 0.4, 0.5)])))
    assert "resumed after 20 steps: curves start there" in page.text
    assert "nDCG@100.40000.5000+0.1000" in page.text and "so there is no interval" in page.text


def test_free_texts_are_escaped():
    assert_escaped(html(training(text=EVIL)), 12)


def test_page_contains_no_secrets():
    flags = {
        "token": "hf_a",
        "hub_token": "hf_b",
        "train_data": ["s3://key:hf_c@bucket/x.jsonl?region=eu&secret_key=hf_d"],
        "deepspeed": {"stage": 2, "api_key": "hf_e", "nested": [{"password": "hf_f"}]},
        "query_instruction_for_retrieval": None,
    }
    details = RunDetails("train", flags, "s3://a:hf_g@b/model", [("s3://a:hf_h@b/x", 3)], {"storage": "gs://x:hf_i@y"})
    assert "hf_" not in html(TrainingReport(details))
    assert details.command_line[3:] == [
        "--train_data",
        "s3://…@bucket/x.jsonl?region=eu&secret_key=…",
        "--deepspeed",
        '{"stage": 2, "nested": [{}]}',
    ]


@pytest.mark.parametrize("steps", [0, 1, 2, 21])
def test_page_of_few_steps(steps):
    page = html(training(steps or 1, spans=spans(steps) if steps else ()))
    assert f"{steps} step{'s' * (steps != 1)} · " in Page(page).text
    assert ("<h2>Loss</h2>" in page) == bool(steps)
    assert ("trend" in page.split("</style>")[1]) == (steps == 21)


def test_page_of_a_long_run_names_values_and_not_steps():
    """Above 2,000 updates each value of the charts is that of several steps."""
    merged = [UpdateSpan(2 * i + 1, 2 * i + 2, math.nan if i == 1 else 1.0, 6, 1e-5, 3.0, 9) for i in range(4)]
    text = Page(html(training(8, spans=[*merged, UpdateSpan(9, 9, 1.0, 3, 1e-5, 1.5, 5)]))).text
    assert "9 steps" in text and "median of mean step times1.5 s" in text
    assert "Mean loss of one worker's queries in up to 2 steps per value." in text
    assert "The loss of 1 value is not finite." in text
    text = Page(html(training(4))).text
    assert "Mean loss of one worker's queries at each step." in text and "median step time" in text


def test_page_without_measurements():
    page = Page(html(TrainingReport(run("train"))))
    assert "Training run without a loss" in page.text and "--learning_rate 2e-05" in page.text
    assert not any(tag == "svg" for tag, _ in page.elements)
    for head in ("Metrics", "Loss", "Scores", "Held-out", "Speed"):
        assert head not in page.text


def test_values_that_are_not_finite_are_reported_and_not_drawn():
    nan = math.nan
    odd = [UpdateSpan(i, i, value, 6, nan, 0.0, 0) for i, value in enumerate([1.0, nan, math.inf, 0.5], 1)]
    odd.append(UpdateSpan(5, 5, nan, 0, nan, 0.0, 0))  # no queries, so no loss is missing
    scores = [BatchScores(1, [nan], [math.inf], []), BatchScores(4, [nan, 0.5], [0.1], [])]
    changes = [MetricChange("nDCG@10", nan, 0.5, nan, nan, 3)]
    page = html(training(4, spans=odd, scores=scores, changes=changes, evaluations=[(0, {"a@1": nan})] * 3))
    assert "The loss of 2 steps is not finite" in page and "Loss" in page
    assert not re.search(r'(?:d|cx|cy|x|y)="[^"]*(?:nan|inf)', page)
    assert "not finite" in Page(page).text and "Step 4" in page and "Step 1<" not in page
    every = html(training(4, spans=[UpdateSpan(1, 1, nan, 6, nan, 1.0, 3)], changes=()))
    assert "Training run without a loss" in every and "<h2>Loss</h2>" not in every
    Page(every)


def test_negatives_are_shown_by_kind():
    counts = [NegativeCounts(1, 100, 5, 0, 20), NegativeCounts(3, 100, 5, 0, 10)]
    page = html(training(4, negatives=counts))
    text = Page(page).text
    assert "in 2 steps: 100 a step. Shares: known positives: 5.00%, masked because" in text
    assert "likely positives: 0.00%, masked by --false_negative_margin; close: 15.00%, used" in text
    assert "share close" in page and "share known positives" in page and "share likely positives" not in page
    assert "<h2>Negatives</h2>" not in html(training(4))


def test_weight_versions_are_in_a_table():
    versions = [
        WeightVersion("last", False, [MetricChange("nDCG@10", 0.5, 0.5, 0.0, 0.0, 30)]),
        WeightVersion("EMA 0.9", True, [MetricChange("nDCG@10", 0.5, 0.625, 0.1, 0.15, 30)]),
    ]
    text = Page(html(training(4, versions=versions))).text
    assert "EMA 0.9 (saved)nDCG@100.6250+0.1250+0.1000 to +0.1500better" in text and "lastnDCG@100.5000" in text


def test_size_is_bounded_for_long_texts_and_thousands_of_steps():
    examples = [
        QueryExample(LONG, LONG, 0, 1, [PassageHit(LONG, True)] * 3, [PassageHit(LONG, False)] * 3) for _ in range(20)
    ]
    page = html(training(20_000, examples=examples))
    assert len(page) < 250_000
    assert "20,000 steps" in page and "…" in page
    assert all(path.count("L") <= 400 for path in re.findall(r'class="curve[^>]*|d="M[^"]*"', page))


def test_file_is_complete(tmp_path):
    write(str(tmp_path / "report.html"), training())
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html(training())
    assert len(list(tmp_path.iterdir())) == 1
