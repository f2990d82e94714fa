"""Configuration of the workers: what changes from one attempt of a run to the next."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from raybge.data.order import Order
from raybge.training.averaging_spec import AveragingSpec
from raybge.training.checkpoint.manifest import RunIdentity, commit_checkpoint
from raybge.training.row_records import RowLog
from raybge.training.worker_config import PlannedRun, TrialContext, WorkerConfig
from raybge.util.errors import UserError


def config_of(folder: Path, **more) -> WorkerConfig:
    order = Order([99], 32, 1)
    return WorkerConfig(
        task=None,
        training={"per_device_train_batch_size": 16, "seed": 3},
        survey=None,
        order=order,
        output_dir=str(folder),
        markers=(),
        cpus=1,
        reading_cpus=2.0,
        logging_dir=None,
        run_state=None,
        identity=RunIdentity("data", 32, 1, 1, "order"),
        **more,
    )


def test_another_number_of_workers_has_other_shares_of_the_same_batch(tmp_path):
    config = config_of(tmp_path).for_attempt(3, 0.5, None)
    assert config.training == {"per_device_train_batch_size": 11, "seed": 3}
    assert (config.reading_cpus, config.resume_from, config.order.global_batch) == (0.5, None, 32)


def test_each_attempt_has_a_row_record_that_starts_at_its_checkpoint(tmp_path):
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    config = config_of(tmp_path, row_log=RowLog(str(tmp_path / "rows"), {}))
    commit_checkpoint(checkpoint, 7, 1, 3, config.identity)
    first = config.for_attempt(2, 1.0, None)
    second = first.for_attempt(3, 1.0, str(checkpoint))
    assert (first.row_log.number, second.row_log.number, second.resume_from) == (1, 2, str(checkpoint))
    attempts = [json.loads((tmp_path / "rows" / f"{number}.json").read_text()) for number in (1, 2)]
    assert attempts == [{"first_update": 0, "workers": 2}, {"first_update": 7, "workers": 3}]


def test_a_run_that_continues_must_have_the_checkpoints_that_are_averaged(tmp_path):
    """Its earlier part may have saved at other updates."""
    spec = SimpleNamespace(
        trainer=SimpleNamespace(flags={"save_steps": 2, "num_train_epochs": 1}, accumulation=1),
        averaging=AveragingSpec(None, 3, False),
        run=SimpleNamespace(storage=str(tmp_path)),
    )
    data = SimpleNamespace(order=SimpleNamespace(steps=8))
    planned = PlannedRun(spec, data, None, 1.0, SimpleNamespace(step=4), TrialContext())
    with pytest.raises(UserError, match="--average_checkpoints 3: the run to continue has no checkpoint of update 4"):
        planned.averaging()
    (tmp_path / "checkpoint-4").mkdir()
    commit_checkpoint(tmp_path / "checkpoint-4", 4, 0, 4, RunIdentity("data", 32, 1, 1, "order"))
    assert planned.averaging().steps == (4, 6, 8)
