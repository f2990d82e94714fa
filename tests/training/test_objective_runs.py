"""Runs with each kind of loss: two with one seed are equal, and a continued one equals an undisturbed one."""

import json
from pathlib import Path

import pytest
from faulty_runs import assert_same_model, full_disk_after_step, make_flags

from raybge.train import finetune
from raybge.training.checkpoint.manifest import latest_checkpoint

DISTILLED = {"knowledge_distillation": True}
LEVERS = {
    "directions": {"directions": ["query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"]},
    "hardness": {"hardness_mode": "all_negatives", "hardness_normalize": True, "false_negative_margin": 0.01},
    "margin_mse": {**DISTILLED, "kd_loss_type": "margin_mse", "teacher_temperature": 4.0, "contrastive_weight": 0.5},
    "score_mse": {**DISTILLED, "kd_loss_type": "score_mse", "contrastive_weight": 0.0},
    "cosent": {**DISTILLED, "kd_loss_type": "cosent"},
    "soft_labels": {**DISTILLED, "kd_loss_type": "soft_labels", "score_bands": ["0=0.5", "2=1"]},
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    """Flags of a run of two workers, with dropout, on groups with scores."""
    folder = tmp_path_factory.mktemp("inputs")
    flags = make_flags(folder)
    rows = [json.loads(line) for line in (folder / "groups.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["pos_scores"], row["neg_scores"] = [3.0 - i % 3], [i % 5 - 2.5, 0.1 * i]
    (folder / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return flags


@pytest.fixture(scope="module")
def plain_loss(flags, tmp_path_factory) -> float:
    from process_runtime import use_processes

    with use_processes():
        return finetune(**flags, output_dir=str(tmp_path_factory.mktemp("plain") / "out")).metrics["train_loss"]


@pytest.mark.parametrize("lever", LEVERS)
def test_a_continued_run_equals_an_undisturbed_one(worker_processes, flags, plain_loss, tmp_path, lever):
    flags = flags | LEVERS[lever]
    outputs = [tmp_path / name for name in ("whole", "again", "lost")]
    results = [finetune(**flags, output_dir=str(output)) for output in outputs[:2]]
    assert abs(results[0].metrics["train_loss"] - plain_loss) > 1e-3
    assert weights_of(outputs[0]) == weights_of(outputs[1])

    with full_disk_after_step(5):
        finetune(**flags, output_dir=str(outputs[2]))
    assert latest_checkpoint(outputs[2]).step == 4
    finetune(**flags, output_dir=str(outputs[2]), resume=True)
    assert_same_model(outputs[2], outputs[0])


def weights_of(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()
