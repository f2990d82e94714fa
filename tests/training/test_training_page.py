"""The report of a training run: everything that was measured, whatever it came to."""

import math
import re

import pytest
from pages import EVIL, LONG, Page, run, spans, training

from raybge.evaluation.metric_changes import Change
from raybge.evaluation.query_examples import Hit, Shown
from raybge.report.run_details import Run, command_of, what_was_run
from raybge.training.page import Training, html, write
from raybge.training.step_metrics import BatchScores, Span


def test_what_the_page_says():
    page = Page(html(training()))
    assert "nDCG@10 0.4100 → 0.5500" in page.text
    assert "30 steps" in page.text and "1 min 15 s of training" in page.text and "2 workers" in page.text
    assert "groups a second12.5" in page.text and "epochs1.5" in page.text and "a step, median0.5 s" in page.text
    assert "+0.1400+0.1200 to +0.1600better" in page.text and "-0.0100 to +0.0300may be chance" in page.text
    assert "the 50 held-out queries" in page.text and "Tokens are those of one of 2 workers" in page.text
    assert "answer at rank 2 → 1" in page.text and "answer at rank beyond 10 → beyond 10" in page.text
    assert "Step 1" in page.text and "Step 30" in page.text and "b.jsonl–" in page.text and "plain1,200" in page.text
    assert page.text.count("✓ plain") == 2
    titles = re.findall(r'aria-label="(.*?)"', html(training()))
    for name in ("loss", "learning rate", "seconds a step", "tokens a second", "nDCG@10", "score"):
        assert any(title.startswith(name) for title in titles)
    assert "continued" not in page.text


def test_a_run_that_was_continued_says_so():
    page = Page(html(training(start=20, changes=[Change("nDCG@10", 0.4, 0.5)])))
    assert "continued after 20 steps: curves begin there" in page.text
    assert "nDCG@100.40000.5000+0.1000–" in page.text and "there is no interval" in page.text


def test_texts_from_outside_are_escaped():
    page = html(training(text=EVIL))
    assert page.count("<script>") == 1  # our own
    found = Page(page)
    assert found.text.count(EVIL) >= 12
    assert not any(name.startswith("on") for _, attributes in found.found for name in attributes)


def test_secrets_stay_out():
    flags = {
        "token": "hf_a",
        "hub_token": "hf_b",
        "train_data": ["s3://key:hf_c@bucket/x.jsonl?region=eu&secret_key=hf_d"],
        "deepspeed": {"stage": 2, "api_key": "hf_e", "nested": [{"password": "hf_f"}]},
        "query_instruction_for_retrieval": None,
    }
    one = Run("train", flags, "s3://a:hf_g@b/model", [("s3://a:hf_h@b/x", 3)], {"storage": "gs://x:hf_i@y"})
    assert "hf_" not in what_was_run(one)
    assert command_of(one)[3:] == [
        "--train_data",
        "s3://…@bucket/x.jsonl?region=eu&secret_key=…",
        "--deepspeed",
        '{"stage": 2, "nested": [{}]}',
    ]


@pytest.mark.parametrize("steps", [0, 1, 2, 21])
def test_a_run_of_few_steps(steps):
    page = html(training(steps or 1, spans=spans(steps) if steps else ()))
    assert f"{steps} step{'s' * (steps != 1)} · " in Page(page).text
    assert ("<h2>Loss</h2>" in page) == bool(steps)
    assert ("trend" in page.split("</style>")[1]) == (steps == 21)


def test_a_page_of_nothing_but_what_was_run():
    page = Page(html(Training(run("train"))))
    assert "A training run without a loss" in page.text and "--learning_rate 2e-05" in page.text
    assert not any(tag == "svg" for tag, _ in page.found)
    for head in ("Metrics", "Loss", "Scores", "Held-out", "The run"):
        assert head not in page.text


def test_what_is_no_number_is_said_and_not_drawn():
    nan = math.nan
    odd = [Span(i, i, value, 6, nan, 0.0, 0) for i, value in enumerate([1.0, nan, math.inf, 0.5], 1)]
    odd.append(Span(5, 5, nan, 0, nan, 0.0, 0))  # without a query there is no loss to be missed
    scores = [BatchScores(1, [nan], [math.inf], []), BatchScores(4, [nan, 0.5], [0.1], [])]
    changes = [Change("nDCG@10", nan, 0.5, nan, nan, 3)]
    page = html(training(4, spans=odd, scores=scores, changes=changes, evaluations=[(0, {"a@1": nan})] * 3))
    assert "2 have no loss that is a number" in page and "Loss" in page
    assert not re.search(r'(?:d|cx|cy|x|y)="[^"]*(?:nan|inf)', page)
    assert "no number" in Page(page).text and "Step 4" in page and "Step 1<" not in page
    every = html(training(4, spans=[Span(1, 1, nan, 6, nan, 1.0, 3)], changes=()))
    assert "A training run without a loss" in every and "<h2>Loss</h2>" not in every
    Page(every)


def test_long_texts_and_thousands_of_steps_are_a_page_of_reasonable_size():
    shown = [Shown(LONG, LONG, 0, 1, [Hit(LONG, True)] * 3, [Hit(LONG, False)] * 3) for _ in range(20)]
    page = html(training(20_000, shown=shown))
    assert len(page) < 250_000
    assert "20,000 steps" in page and "…" in page
    assert all(path.count("L") <= 400 for path in re.findall(r'class="curve[^>]*|d="M[^"]*"', page))


def test_the_file_is_whole(tmp_path):
    write(str(tmp_path / "report.html"), training())
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html(training())
    assert len(list(tmp_path.iterdir())) == 1
