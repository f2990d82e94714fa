"""Every flag of transformers.TrainingArguments: it reaches the Trainer, or it is refused with its reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from raybge.cli.options import REFUSED, TrainOptions
from raybge.cli.parser import build, declared, parse
from raybge.cli.parser import training_flags as all_flags
from raybge.cluster.resources import Plan
from raybge.data.order import Order
from raybge.training import trainer_arguments as training_flags
from raybge.training.trainer_arguments import accumulation, check, process_group, training_arguments
from raybge.util.errors import UserError

NEEDED = {"model_name_or_path": "m", "train_data": ["d"], "output_dir": "o"}
ORDER = Order([100], 12, seed=1)
CPU, GPU = Plan(2, 1, 0), Plan(2, 1, 1)

# What a flag's kind does not say.
VALUES: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": '{"num_cycles": 2}',
    "optim": "sgd",
    "optim_args": "a=1",
    "optim_target_modules": ["attention", "mlp"],
    "activation_checkpointing_kwargs": '{"every_n_layers": 2}',
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "logging_strategy": "epoch",
    "include_num_input_tokens_seen": "all",
    "log_level": "info",
    "log_level_replica": "info",
    "report_to": ["tensorboard"],
    "eval_strategy": "steps",
    "save_strategy": "epoch",
    "metric_for_best_model": "MRR@10",
    "accelerator_config": '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}',
    "debug": "underflow_overflow",
    "fsdp_config": '{"reshard_after_forward": false}',
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
    "eval_steps": 3,
    "max_steps": 3,
    "bf16": True,
    "use_cache": True,
    "logging_steps": 3,
    "save_steps": 3,
}
# What must be given with a flag so that it makes sense.
BESIDE: dict[str, dict[str, Any]] = {
    "eval_strategy": {"eval_data": ["e"], "eval_steps": 2},
    "eval_steps": {"eval_data": ["e"], "eval_strategy": "steps"},
    "eval_delay": {"eval_data": ["e"], "eval_strategy": "epoch"},
    "eval_on_start": {"eval_data": ["e"]},
    "load_best_model_at_end": {"eval_data": ["e"], "eval_strategy": "epoch", "save_strategy": "epoch"},
    "fsdp_config": {"fsdp": "True"},
}
# Those that the driver acts on, or that have a test of their own below.
ELSEWHERE = {
    "output_dir",  # becomes the storage path
    "per_device_train_batch_size",  # becomes the share of a global batch
    "resume_from_checkpoint",  # test_checkpoints.py, test_restarts.py
    "do_train",  # transformers does not use it either
    "do_eval",  # needs --eval_data, below
    "use_cpu",
    "fsdp",
    "deepspeed",
    "ddp_backend",
    "tf32",
    "fp16",
    "bf16",
    "warmup_steps",
}
ACCEPTED = sorted(set(all_flags()) - set(REFUSED) - ELSEWHERE)


def arguments_of(**flags: Any) -> TrainOptions:
    return build(TrainOptions, {**NEEDED, **flags})


def value_of(name: str) -> Any:
    flag = all_flags()[name]
    if name in VALUES:
        return VALUES[name]
    return {"bool": flag.default is not True, "int": 7, "float": 0.25, "str": "other", "json": '{"a": 1}'}[flag.kind]


def test_every_flag_is_sorted():
    assert len(all_flags()) == 114
    assert set(REFUSED) <= set(all_flags())


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_flag_reaches_the_trainer(name, monkeypatch):
    monkeypatch.setattr(training_flags, "_check_reporting", lambda _: None)  # what is installed is tested below
    given = arguments_of(**{name: value_of(name)}, **BESIDE.get(name, {}))
    check(given)
    if name == "fsdp_config":
        told = training_arguments(given, GPU, ORDER, Path("/s"))
        assert told["fsdp_config"]["reshard_after_forward"] is False
        return
    told = training_arguments(given, CPU, ORDER, Path("/s"))
    args = transformers.TrainingArguments(**told)
    expected = given.training[name]
    reached = getattr(args, name)
    if name == "accelerator_config":
        reached = {"gradient_accumulation_kwargs": reached.gradient_accumulation_kwargs}
    if name == "debug":
        reached = reached[0].value
    assert reached == expected
    assert reached != getattr(transformers.TrainingArguments("o", use_cpu=True), name)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_flag_says_why(name):
    flag = all_flags()[name]
    value = {"bool": flag.default is not True, "int": 7, "float": 0.25, "str": "other", "json": '{"a": 1}'}[flag.kind]
    with pytest.raises(UserError) as error:
        arguments_of(**{name: [value] if flag.many else value})
    assert str(error.value) == f"--{name} cannot be used: {REFUSED[name]}"


def test_a_refused_flag_at_its_default_is_no_error():
    given = {"label_smoothing_factor": 0.0, "dataloader_pin_memory": True, "push_to_hub": "False"}
    assert given.keys() <= REFUSED.keys()
    training = arguments_of(**given).training
    assert {name: training[name] for name in given} == {**given, "push_to_hub": False}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be above 0, found 0"),
        ({"num_train_epochs": 0.0}, "--num_train_epochs must be above 0"),
        ({"save_steps": -1}, "--save_steps must be above 0"),
        ({"max_failures": -2}, "--max_failures must be at least -1"),
        ({"stall_timeout": -1.0}, "--stall_timeout must be at least 0 (off)"),
        ({"max_bad_steps": -1}, "--max_bad_steps must be at least 0 (off)"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "--warmup_ratio and --warmup_steps"),
        ({"bf16": True, "fp16": True}, "--bf16 and --fp16"),
        ({"eval_strategy": "epoch"}, "--eval_strategy epoch needs --eval_data"),
        ({"do_eval": True}, "--do_eval needs --eval_data"),
        ({"eval_on_start": True}, "--eval_on_start needs --eval_data"),
        ({"eval_steps": 5, "eval_data": ["e"]}, "--eval_steps needs --eval_strategy"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end True needs --eval_strategy"),
        ({"save_strategy": "best"}, "--save_strategy best needs --eval_strategy"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "--lr_scheduler_type reduce_lr_on_plateau needs"),
        ({"metric_for_best_model": "loss"}, "takes one of nDCG@10, MRR@10, found «loss»"),
        ({"report_to": ["paper"]}, "--report_to takes none, all, or some of azure_ml"),
        ({"report_to": ["neptune"]}, "--report_to neptune: it is not installed; `pip install neptune`"),
        ({"accelerator_config": '{"split_batches": true}'}, "--accelerator_config split_batches cannot be used"),
        (
            {"accelerator_config": '{"gradient_accumulation_kwargs": {"num_steps": 4}}'},
            "gradient_accumulation_kwargs.num_steps",
        ),
        ({"fsdp": "full_shard auto_wrap"}, "--fsdp takes True or False"),
        ({"fsdp_config": '{"version": 2}'}, "--fsdp_config needs --fsdp True"),
        ({"fsdp": "True", "fsdp_config": '{"version": 1}'}, "--fsdp_config version 1 cannot be used"),
        ({"fsdp": "True", "fsdp_config": '{"fsdp_min_num_params": 100}'}, "--fsdp_config fsdp_min_num_params"),
        ({"fsdp": "True", "fsdp_config": '{"xla": true}'}, "--fsdp_config xla"),
    ],
)
def test_flags_that_do_not_go_together_are_named(flags, says):
    with pytest.raises(UserError) as error:
        check(arguments_of(**flags))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stage: 2", "is not JSON"),
        ('{"zero_optimization": {"stage": 2}', "is not JSON"),
        ('["zero"]', "expected a JSON object, found list"),
    ],
)
@pytest.mark.parametrize("name", ["deepspeed", "fsdp_config", "accelerator_config"])
def test_a_file_that_is_not_json_is_named(tmp_path, name, text, says):
    path = tmp_path / "config.json"
    path.write_text(text)
    line = [word for flag, value in NEEDED.items() for word in (f"--{flag}", value if isinstance(value, str) else "d")]
    for give in (
        lambda: arguments_of(**{name: str(path)}),
        lambda: parse(TrainOptions, [*line, f"--{name}", str(path)], ""),
    ):
        with pytest.raises(UserError) as error:
            give()
        assert str(error.value).startswith(f"--{name}: {path}") and says in str(error.value)
    with pytest.raises(UserError, match=f"--{name}: cannot read nowhere.json"):
        arguments_of(**{name: "nowhere.json"})


def test_deepspeed(monkeypatch, tmp_path):
    """Only what reaches the Trainer: DeepSpeed itself needs GPUs."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 12}))
    given = arguments_of(deepspeed=str(path))
    monkeypatch.setattr(training_flags.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        check(given)
    monkeypatch.setattr(training_flags.importlib.util, "find_spec", lambda _: "found")
    check(given)
    told = training_arguments(given, GPU, ORDER, Path("/s"))
    assert told["deepspeed"] == {
        "zero_optimization": {"stage": 2},
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    with pytest.raises(UserError, match="--deepspeed needs GPUs"):
        training_arguments(given, CPU, ORDER, Path("/s"))
    with pytest.raises(UserError, match="ZeRO stage 3"):
        check(arguments_of(deepspeed={"zero_optimization": {"stage": 3}}))
    with pytest.raises(UserError, match="give one"):
        check(arguments_of(deepspeed=str(path), fsdp="True"))


def test_fsdp():
    given = arguments_of(fsdp="True", fsdp_config='{"cpu_offload": true}')
    check(given)
    told = training_arguments(given, GPU, ORDER, Path("/s"))
    assert told["fsdp"] is True
    assert told["fsdp_config"] == {"cpu_offload": True, "auto_wrap_policy": "NO_WRAP"}
    with pytest.raises(UserError, match="--fsdp needs GPUs"):
        training_arguments(given, CPU, ORDER, Path("/s"))
    with pytest.raises(UserError, match="there is 1"):
        training_arguments(given, Plan(1, 1, 1), ORDER, Path("/s"))
    assert "fsdp" not in training_arguments(arguments_of(fsdp="False"), CPU, ORDER, Path("/s"))


def test_the_process_group_is_started_as_the_flags_say():
    assert process_group(arguments_of(), CPU) == {"backend": "gloo", "timeout_s": 1800}
    assert process_group(arguments_of(), GPU) == {"backend": "nccl", "timeout_s": 1800}
    given = arguments_of(ddp_backend="cpu:gloo,cuda:nccl", ddp_timeout=60)
    assert process_group(given, GPU) == {"backend": "cpu:gloo,cuda:nccl", "timeout_s": 60}
    with pytest.raises(UserError, match="--ddp_backend nccl needs GPUs"):
        process_group(arguments_of(ddp_backend="nccl"), CPU)


def test_what_depends_on_the_plan():
    half = arguments_of(bf16=True, tf32=True)
    assert training_arguments(half, GPU, ORDER, Path("/s"))["bf16"] is True
    with pytest.raises(UserError, match="--tf32 needs GPUs"):
        training_arguments(half, CPU, ORDER, Path("/s"))
    told = training_arguments(arguments_of(fp16=True), CPU, ORDER, Path("/s"))
    assert (told["use_cpu"], told["fp16"], told["bf16"]) == (True, False, False)
    assert told["output_dir"] == "/s" and told["per_device_train_batch_size"] == 6
    assert training_arguments(arguments_of(warmup_ratio=0.25), CPU, ORDER, Path("/s"))["warmup_steps"] == 0.25
    assert training_arguments(arguments_of(warmup_steps=7), CPU, ORDER, Path("/s"))["warmup_steps"] == 7
    best = arguments_of(load_best_model_at_end=True, eval_strategy="epoch", eval_data=["e"])
    assert training_arguments(best, CPU, ORDER, Path("/s"))["metric_for_best_model"] == "nDCG@10"
    assert accumulation(arguments_of()) == 1 and accumulation(arguments_of(gradient_accumulation_steps=4)) == 4
    assert not any(name in told for name in ("resume_from_checkpoint", "do_train"))


def test_a_pattern_of_modules_is_not_a_list():
    for given, told in ((["all-linear"], "all-linear"), ([r".*attn.*"], ".*attn.*"), (["attn"], ["attn"])):
        arguments = arguments_of(optim_target_modules=given)
        assert training_arguments(arguments, CPU, ORDER, Path("/s"))["optim_target_modules"] == told


def test_every_own_flag_has_a_place():
    """None of TrainingArguments' names is declared twice but those that the recipe kept."""
    own = {f.name for f in declared(TrainOptions).values() if not f.transformers}
    assert not own & set(all_flags())
