"""Content of the training report, from real steps and evaluations in this process."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from trainers import FailAt, LocalStream, RunLost

from raybge.cli.options import TrainOptions
from raybge.cli.parser import build_options
from raybge.evaluation.in_training import RetrievalValidator
from raybge.evaluation.metric_changes import METRIC_CHANGES, to_json
from raybge.evaluation.spec import ValidationSpec
from raybge.evaluation.validation_data import prepare
from raybge.training.checkpoint.manifest import latest_checkpoint
from raybge.training.final_weights import _metric_changes
from raybge.training.page import collect_report, write_report

CARD = dict(data=[("groups", 50)], versions={"a": "1"})
FLAGS = {"learning_rate": 1e-3, "token": "hf_x"}


@pytest.fixture
def validation(survey, dropout_model, tmp_path):
    required = dict(
        model_name_or_path=dropout_model, train_data="none", output_dir="none", eval_data=[survey.files[0].name]
    )
    options = build_options(TrainOptions, {**required, "query_max_len": 8, "passage_max_len": 12})
    data = prepare(ValidationSpec.from_options(options), tmp_path)
    return RetrievalValidator(data, 0, 1)


def config_of(trainer):
    validation = trainer.validation.data if trainer.validation else None
    task = SimpleNamespace(spec=SimpleNamespace(command="train", row_noun="group", base_model="tiny"))
    return SimpleNamespace(task=task, card=CARD, flags=FLAGS, order=trainer.stream.order, validation=validation)


def report(trainer, **metrics):
    metrics[METRIC_CHANGES] = to_json(_metric_changes(trainer, metrics))
    return collect_report(config_of(trainer), trainer, metrics, trainer.query_examples())


def test_report_contains_all_steps_and_both_ends(make_trainer, validation):
    trainer = make_trainer(validation=validation, eval_strategy="epoch", eval_on_start=True)
    result = trainer.train()
    content = report(trainer, **result.metrics)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert [span.loss for span in content.spans] == pytest.approx(logged, abs=1e-4) and len(logged) == 18
    assert [span.rate for span in content.spans] == pytest.approx(rates)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    assert [span.norm for span in content.spans] == pytest.approx(norms, rel=1e-3) and min(norms) > 0
    assert 0 < sum(span.seconds for span in content.spans) < result.metrics["train_runtime"]
    tokens = sum(sum(map(len, item["batch"].token_ids)) for item in LocalStream.__iter__(trainer.stream))
    assert sum(span.tokens for span in content.spans[-9:]) == tokens
    assert [scores.step for scores in content.scores] == [1, 18]
    assert [len(scores.positives) for scores in content.scores] == [6, 2]  # the last step of an epoch has two rows
    assert [step for step, _ in content.evaluations] == [0, 9, 18] and len(content.examples) == 20 and not content.start
    for change in content.changes:
        means = [metrics[change.metric] for _, metrics in content.evaluations]
        assert (change.before, change.after) == pytest.approx((means[0], means[-1]))
        assert change.low <= change.after - change.before <= change.high and change.queries == 50


def test_steps_do_not_depend_on_evaluations(make_trainer, validation):
    reports = []
    for flags in ({}, dict(validation=validation, eval_strategy="steps", eval_steps=5, eval_on_start=True)):
        trainer = make_trainer(num_train_epochs=1, **flags)
        trainer.train()
        reports.append(report(trainer))
    without, measured = reports
    assert [span.loss for span in without.spans] == [span.loss for span in measured.spans]
    assert without.scores == measured.scores and not without.changes and not without.examples


def test_report_of_a_resumed_run(make_trainer, validation):
    """Each query's result before the first step is in the checkpoint."""
    flags = dict(validation=validation, eval_strategy="epoch", save_strategy="steps", save_steps=6)
    lost = make_trainer([FailAt(14)], eval_on_start=True, **flags)
    with pytest.raises(RunLost):
        lost.train()
    lost.writer.wait()
    validation.last_result = None
    trainer = make_trainer(**flags)
    trainer.train(resume_from_checkpoint=latest_checkpoint(Path(trainer.args.output_dir)).path)
    content = report(trainer, **{f"eval_{name}": 0.5 for name in ("nDCG@10", "MRR@10")})
    assert content.start == 12 and [span.first for span in content.spans] == list(range(13, 19))
    assert [scores.step for scores in content.scores] == [13, 18] and len(content.examples) == 20
    assert [step for step, _ in content.evaluations] == [0, 9, 18]
    assert {change.metric: change.before for change in content.changes} == pytest.approx(content.evaluations[0][1])
    for change in content.changes:
        assert change.low <= change.difference <= change.high and change.queries == 50
    trainer.first_result = None  # a checkpoint of an earlier version: only the means are known
    changes = report(trainer, **{f"eval_{name}": 0.5 for name in ("nDCG@10", "MRR@10")}).changes
    assert all(change.after == 0.5 and change.low is None for change in changes)


def test_failed_report_is_logged_and_the_run_continues(make_trainer, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    write_report(tmp_path, config_of(trainer), trainer, {}, [])
    page = (tmp_path / "report.html").read_text()
    assert "1 step ·" in page and "hf_x" not in page and math.isfinite(trainer.step_metrics.spans[0].loss)
    monkeypatch.setattr("raybge.training.page.collect_report", lambda *_: 1 / 0)
    write_report(tmp_path, config_of(trainer), trainer, {}, [])
    assert "ZeroDivisionError" in capsys.readouterr().err and (tmp_path / "report.html").read_text() == page
