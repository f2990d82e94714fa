"""What a run knows of itself at its end, from real steps and evaluations in this process."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from trainers import FailAt, LocalStream, RunLost

from raybge.cli.options import TrainOptions
from raybge.cli.parser import build_options
from raybge.evaluation.spec import ValidationSpec
from raybge.evaluation.validation_data import prepare
from raybge.evaluation.in_training import RetrievalValidator
from raybge.training import report as training_report
from raybge.training.checkpoint.manifest import latest_checkpoint
from raybge.training.report import training_of, write_report

CARD = dict(
    flags={"learning_rate": 1e-3, "token": "hf_x"}, base_model="tiny", data=[("groups", 50)], versions={"a": "1"}
)


@pytest.fixture
def validation(survey, dropout_model, tmp_path):
    given = dict(model_name_or_path=dropout_model, train_data="none", output_dir="none", eval_data=[survey.files[0].name])
    options = build_options(TrainOptions, {**given, "query_max_len": 8, "passage_max_len": 12})
    config = prepare(ValidationSpec.from_options(options), tmp_path)
    return RetrievalValidator(config, 0, 1)


def config_of(made):
    validation = made.validation.config if made.validation else None
    task = SimpleNamespace(command="train", rows="groups")
    return SimpleNamespace(task=task, card=CARD, order=made.stream.order, validation=validation)


def report(made, **metrics):
    return training_of(config_of(made), made, metrics, made.query_examples())


def test_every_step_and_both_ends_are_in_the_report(make_trainer, validation):
    made = make_trainer(validation=validation, eval_strategy="epoch", eval_on_start=True)
    result = made.train()
    seen = report(made, **result.metrics)
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    rates = [entry["learning_rate"] for entry in made.state.log_history if "loss" in entry]
    assert [span.loss for span in seen.spans] == pytest.approx(logged, abs=1e-4) and len(logged) == 18
    assert [span.rate for span in seen.spans] == pytest.approx(rates)
    assert 0 < sum(span.seconds for span in seen.spans) < result.metrics["train_runtime"]
    tokens = sum(sum(map(len, item["batch"].token_ids)) for item in LocalStream.__iter__(made.stream))
    assert sum(span.tokens for span in seen.spans[-9:]) == tokens
    assert [scores.step for scores in seen.scores] == [1, 18]
    assert [len(scores.positives) for scores in seen.scores] == [6, 2]  # the last step of an epoch has two rows
    assert [step for step, _ in seen.evaluations] == [0, 9, 18] and len(seen.shown) == 20 and not seen.start
    for change in seen.changes:
        means = [metrics[change.metric] for _, metrics in seen.evaluations]
        assert (change.before, change.after) == pytest.approx((means[0], means[-1]))
        assert change.low <= change.after - change.before <= change.high and change.queries == 50


def test_steps_are_the_same_with_and_without_an_evaluation(make_trainer, validation):
    seen = []
    for flags in ({}, dict(validation=validation, eval_strategy="steps", eval_steps=5, eval_on_start=True)):
        made = make_trainer(num_train_epochs=1, **flags)
        made.train()
        seen.append(report(made))
    plain, measured = seen
    assert [span.loss for span in plain.spans] == [span.loss for span in measured.spans]
    assert plain.scores == measured.scores and not plain.changes and not plain.shown


def test_a_continued_run_says_where_it_began(make_trainer, validation):
    """What was measured before it is known as a mean alone."""
    flags = dict(validation=validation, eval_strategy="epoch", save_strategy="steps", save_steps=6)
    with pytest.raises(RunLost):
        make_trainer([FailAt(14)], eval_on_start=True, **flags).train()
    validation.last_result = None
    made = make_trainer(**flags)
    made.train(resume_from_checkpoint=latest_checkpoint(Path(made.args.output_dir)).path)
    seen = report(made, **{f"eval_{name}": 0.5 for name in ("nDCG@10", "MRR@10")})
    assert seen.start == 12 and [span.first for span in seen.spans] == list(range(13, 19))
    assert [scores.step for scores in seen.scores] == [13, 18] and not seen.shown
    assert [step for step, _ in seen.evaluations] == [0, 9, 18]
    assert all(change.after == 0.5 and change.low is None for change in seen.changes)
    assert {change.metric: change.before for change in seen.changes} == seen.evaluations[0][1]


def test_a_report_that_fails_leaves_the_run_alone(make_trainer, tmp_path, monkeypatch, capsys):
    made = make_trainer(max_steps=1)
    made.train()
    write_report(tmp_path, config_of(made), made, {}, [])
    page = (tmp_path / "report.html").read_text()
    assert "1 step ·" in page and "hf_x" not in page and math.isfinite(made.step_metrics.spans[0].loss)
    monkeypatch.setattr(training_report, "training_of", lambda *_: 1 / 0)
    write_report(tmp_path, config_of(made), made, {}, [])
    assert "ZeroDivisionError" in capsys.readouterr().err and (tmp_path / "report.html").read_text() == page
