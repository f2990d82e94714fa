"""Runs that would change nothing are refused with a value that works; small ones are named."""

import pytest
import torch
import transformers
from accelerate import Accelerator

from raybge.cli.options import TrainOptions
from raybge.cli.parser import build_options
from raybge.training.schedule_check import check_rates, update_count
from raybge.training.spec import TrainerSpec
from raybge.training.trainer_arguments import worker_flags
from raybge.util.errors import UserError

REQUIRED = dict(model_name_or_path="m", train_data=["d"], output_dir="o")


def spec(**flags) -> TrainerSpec:
    return TrainerSpec.from_options(build_options(TrainOptions, {**REQUIRED, **flags}))


def trained_rates(trainer: TrainerSpec, updates: int) -> list[float]:
    """Return the rates of the updates of transformers' own Trainer on one weight."""
    flags = worker_flags(trainer) | {"output_dir": "o", "use_cpu": True, "max_steps": updates}
    args = transformers.TrainingArguments(**flags)
    helper = transformers.Trainer(torch.nn.Linear(1, 1), args)
    helper.create_optimizer_and_scheduler(updates)
    rates = []
    for _ in range(updates):
        rates.append(helper.optimizer.param_groups[0]["lr"])
        helper.optimizer.step()
        helper.lr_scheduler.step()
    return rates


CASES = [
    ({}, 1, None),
    ({"warmup_ratio": 0.1}, 1, r"--warmup_ratio 0.1: the run has 1 update only, .*: give --warmup_ratio 0"),
    ({"warmup_ratio": 0.1}, 2, None),
    ({"warmup_steps": 1}, 1, r"--warmup_steps 1: .*: give --warmup_steps 0"),
    ({"warmup_steps": 500}, 1, r"--warmup_steps 500: "),
    ({"warmup_steps": 500}, 2, None),
    ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 9}, 1, "--warmup_steps 9: "),
    ({"lr_scheduler_type": "constant", "warmup_steps": 9}, 1, None),
    ({"lr_scheduler_type": "cosine", "warmup_ratio": 0.5}, 1, "--warmup_ratio 0.5: "),
    ({"lr_scheduler_type": "polynomial"}, 1, None),
]


@pytest.mark.parametrize(("flags", "updates", "message"), CASES, ids=str)
def test_run_whose_rates_are_all_0_is_refused(flags, updates, message):
    """As in transformers' own Trainer."""
    trainer = spec(**flags)
    assert (not any(trained_rates(trainer, updates))) == (message is not None)
    if message is None:
        assert check_rates(trainer, updates) == [
            f"{updates} update{'s' if updates > 1 else ''} in all: a run of fewer than 20 changes a model little; give "
            "more epochs or a smaller batch"
        ]
        return
    with pytest.raises(UserError, match=message):
        check_rates(trainer, updates)
    name = next(name for name in ("warmup_ratio", "warmup_steps") if name in flags)
    assert any(trained_rates(spec(**{**flags, name: 0}), updates))  # the value that the message gives


def test_rate_of_0_on_purpose_is_a_line():
    assert check_rates(spec(learning_rate=0), 100) == ["--learning_rate 0: the weights do not change"]
    assert check_rates(spec(), 100) == []


def test_number_of_updates_is_that_of_the_trainer():
    """Of 10 steps an epoch."""
    for flags, expected in (
        ({}, 30),
        ({"num_train_epochs": 2}, 20),
        ({"num_train_epochs": 0.25}, 3),
        ({"max_steps": 7}, 7),
        ({"num_train_epochs": 2, "gradient_accumulation_steps": 4}, 6),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 40}, 1),
    ):
        trainer = spec(**flags)
        args = transformers.TrainingArguments(**{**trainer.flags, "output_dir": "o", "use_cpu": True})
        helper = transformers.Trainer(torch.nn.Linear(1, 1), args, train_dataset=range(10))
        assert update_count(trainer, 10) == expected
        assert helper.set_initial_training_values(args, [None] * 10)[-1] == expected


def test_the_state_of_accelerate_stays():
    """A program that calls raybge.finetune may use accelerate itself."""
    accelerator = Accelerator(cpu=True)
    check_rates(spec(learning_rate=1e-4), 100)
    assert accelerator.mixed_precision == "no"
