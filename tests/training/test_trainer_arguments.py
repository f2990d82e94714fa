"""Every flag of transformers.TrainingArguments: it reaches the Trainer, or it is refused with its reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from raybge.cli.options import NO_EFFECT, REFUSED, TrainOptions
from raybge.cli.parser import build_options, declared_flags, parse_options
from raybge.cli.training_arguments import training_argument_flags as all_flags
from raybge.cluster.resources import Plan
from raybge.data.order import Order
from raybge.training.spec import TrainerSpec
from raybge.training.trainer_arguments import process_group, training_arguments
from raybge.util.errors import UserError

NEEDED = {"model_name_or_path": "m", "train_data": ["d"], "output_dir": "o"}
ORDER = Order([100], 12, seed=1)
CPU, GPU = Plan(2, 1, 0), Plan(2, 1, 1)

# Values of flags whose kind alone does not give a valid one.
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
# Flags that another flag requires.
REQUIRED: dict[str, dict[str, Any]] = {
    "eval_strategy": {"eval_data": ["e"], "eval_steps": 2},
    "eval_steps": {"eval_data": ["e"], "eval_strategy": "steps"},
    "eval_delay": {"eval_data": ["e"], "eval_strategy": "epoch"},
    "eval_on_start": {"eval_data": ["e"]},
    "load_best_model_at_end": {"eval_data": ["e"], "eval_strategy": "epoch", "save_strategy": "epoch"},
    "fsdp_config": {"fsdp": "True"},
}
# Flags that the driver acts on, or that have a test of their own below.
ELSEWHERE = {
    "output_dir",  # becomes the storage path
    "per_device_train_batch_size",  # becomes the share of a global batch
    "resume_from_checkpoint",  # checkpoint/test_manifest.py, test_restarts.py
    "do_train",  # transformers does not use it either
    "do_eval",  # requires --eval_data, below
    "use_cpu",  # leads to a plan without GPUs, test_training_spec.py
    "fsdp",
    "deepspeed",
    "ddp_backend",
    "tf32",
    "fp16",
    "bf16",
    "warmup_steps",
}
ACCEPTED = sorted(set(all_flags()) - set(REFUSED) - set(NO_EFFECT) - ELSEWHERE)


def trainer_spec(**flags: Any) -> TrainerSpec:
    return TrainerSpec.from_options(build_options(TrainOptions, {**NEEDED, **flags}))


def arguments(plan: Plan, **flags: Any) -> dict[str, Any]:
    return training_arguments(trainer_spec(**flags), plan, ORDER, Path("/s"))


def default_of_kind(kind: str, default: Any) -> Any:
    """A value of the kind that is not the default."""
    return {"bool": default is not True, "int": 7, "float": 0.25, "str": "other", "json": '{"a": 1}'}[kind]


def value_of(name: str) -> Any:
    flag = all_flags()[name]
    return VALUES[name] if name in VALUES else default_of_kind(flag.kind, flag.default)


def test_every_flag_is_accepted_or_refused():
    assert len(all_flags()) == 114
    assert set(REFUSED) <= set(all_flags())


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_flag_reaches_the_trainer(name):
    spec = trainer_spec(**{name: value_of(name)}, **REQUIRED.get(name, {}))
    if name == "fsdp_config":
        keywords = training_arguments(spec, GPU, ORDER, Path("/s"))
        assert keywords["fsdp_config"]["reshard_after_forward"] is False
        return
    args = transformers.TrainingArguments(**training_arguments(spec, CPU, ORDER, Path("/s")))
    value = getattr(args, name)
    if name == "accelerator_config":
        value = {"gradient_accumulation_kwargs": value.gradient_accumulation_kwargs}
    if name == "debug":
        value = value[0].value
    assert value == spec.flags[name]
    assert value != getattr(transformers.TrainingArguments("o", use_cpu=True), name)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_flag_has_its_reason(name):
    flag = all_flags()[name]
    value = default_of_kind(flag.kind, flag.default)
    with pytest.raises(UserError) as error:
        trainer_spec(**{name: [value] if flag.many else value})
    assert str(error.value) == f"--{name} cannot be used: {REFUSED[name]}"


def test_a_refused_flag_at_its_default_is_no_error():
    flags = {"label_smoothing_factor": 0.0, "dataloader_in_order": True, "push_to_hub": "False"}
    assert flags.keys() <= REFUSED.keys()
    read = trainer_spec(**flags).flags
    assert {name: read[name] for name in flags} == {**flags, "push_to_hub": False}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be above 0, found 0"),
        ({"num_train_epochs": 0.0}, "--num_train_epochs must be above 0"),
        ({"save_steps": -1}, "--save_steps must be above 0"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "--warmup_ratio and --warmup_steps"),
        ({"bf16": True, "fp16": True}, "--bf16 and --fp16"),
        ({"eval_strategy": "epoch"}, "--eval_strategy epoch requires --eval_data"),
        ({"do_eval": True}, "--do_eval requires --eval_data"),
        ({"eval_on_start": True}, "--eval_on_start requires --eval_data"),
        ({"eval_steps": 5, "eval_data": ["e"]}, "--eval_steps requires --eval_strategy"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end True requires --eval_strategy"),
        ({"save_strategy": "best"}, "--save_strategy best requires --eval_strategy"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "--lr_scheduler_type reduce_lr_on_plateau requires"),
        ({"metric_for_best_model": "loss"}, "must be one of nDCG@10, MRR@10, found «loss»"),
        ({"accelerator_config": '{"split_batches": true}'}, "--accelerator_config split_batches cannot be used"),
        (
            {"accelerator_config": '{"gradient_accumulation_kwargs": {"num_steps": 4}}'},
            "gradient_accumulation_kwargs.num_steps",
        ),
        ({"fsdp": "full_shard auto_wrap"}, "--fsdp must be True or False"),
        ({"fsdp_config": '{"version": 2}'}, "--fsdp_config requires --fsdp True"),
        ({"fsdp": "True", "fsdp_config": '{"version": 1}'}, "--fsdp_config version 1 cannot be used"),
        ({"fsdp": "True", "fsdp_config": '{"fsdp_min_num_params": 100}'}, "--fsdp_config fsdp_min_num_params"),
        ({"fsdp": "True", "fsdp_config": '{"auto_wrap_policy": "SIZE_BASED_WRAP"}'}, "units are layers"),
        ({"fsdp": "True", "fsdp_config": '{"xla": true}'}, "--fsdp_config xla"),
    ],
)
def test_flags_that_exclude_each_other_are_named(flags, message):
    with pytest.raises(UserError) as error:
        trainer_spec(**flags)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: 2", "is not JSON"),
        ('{"zero_optimization": {"stage": 2}', "is not JSON"),
        ('["zero"]', "expected a JSON object, found list"),
    ],
)
@pytest.mark.parametrize("name", ["deepspeed", "fsdp_config", "accelerator_config"])
def test_a_file_that_is_not_json_is_named(tmp_path, name, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    line = [word for flag, value in NEEDED.items() for word in (f"--{flag}", value if isinstance(value, str) else "d")]
    for read in (
        lambda: trainer_spec(**{name: str(path)}),
        lambda: parse_options(TrainOptions, [*line, f"--{name}", str(path)], ""),
    ):
        with pytest.raises(UserError) as error:
            read()
        assert f"--{name}: {path}" in str(error.value) and message in str(error.value)
    with pytest.raises(UserError, match=f"--{name}: cannot read nowhere.json"):
        trainer_spec(**{name: "nowhere.json"})


@pytest.mark.parametrize("name", sorted(NO_EFFECT))
def test_a_flag_without_effect_says_so(name):
    """Commands of FlagEmbedding's documents have such flags."""
    flag, lines = all_flags()[name], []
    value = default_of_kind(flag.kind, flag.default)
    options = build_options(TrainOptions, {**NEEDED, name: value}, lines.append)
    assert lines == [f"--{name} has no effect: {NO_EFFECT[name]}"]
    assert name not in options.training
    build_options(TrainOptions, {**NEEDED, name: flag.default}, lines.append)
    assert len(lines) == 1


def test_deepspeed(tmp_path):
    """Only the arguments of the Trainer: DeepSpeed itself requires GPUs."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 12}))
    assert arguments(GPU, deepspeed=str(path))["deepspeed"] == {
        "zero_optimization": {"stage": 2},
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    with pytest.raises(UserError, match="--deepspeed requires GPUs"):
        arguments(CPU, deepspeed=str(path))
    with pytest.raises(UserError, match="ZeRO stage 3"):
        trainer_spec(deepspeed={"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match="give one"):
        trainer_spec(deepspeed=str(path), fsdp="True")


def test_fsdp():
    flags = {"fsdp": "True", "fsdp_config": '{"cpu_offload": true}'}
    keywords = arguments(GPU, **flags)
    assert keywords["fsdp"] is True
    assert keywords["fsdp_config"] == {"cpu_offload": True}
    with pytest.raises(UserError, match="--fsdp requires GPUs"):
        arguments(CPU, **flags)
    with pytest.raises(UserError, match="found 1"):
        arguments(Plan(1, 1, 1), **flags)
    assert "fsdp" not in arguments(CPU, fsdp="False")


def test_the_process_group_follows_the_flags():
    assert process_group({}, CPU) == {"backend": "gloo", "timeout_s": 1800}
    assert process_group({}, GPU) == {"backend": "nccl", "timeout_s": 1800}
    flags = trainer_spec(ddp_backend="cpu:gloo,cuda:nccl", ddp_timeout=60).flags
    assert process_group(flags, GPU) == {"backend": "cpu:gloo,cuda:nccl", "timeout_s": 60}
    with pytest.raises(UserError, match="--ddp_backend nccl requires GPUs"):
        process_group({"ddp_backend": "nccl"}, CPU)


def test_arguments_that_depend_on_the_plan():
    assert arguments(GPU, bf16=True, tf32=True)["bf16"] is True
    with pytest.raises(UserError, match="--tf32 requires GPUs"):
        arguments(CPU, bf16=True, tf32=True)
    keywords = arguments(CPU, fp16=True)
    assert (keywords["use_cpu"], keywords["fp16"]) == (True, False)
    assert arguments(CPU, bf16=True)["bf16"] is True  # the worker decides
    assert keywords["output_dir"] == "/s" and keywords["per_device_train_batch_size"] == 6
    assert arguments(CPU, warmup_ratio=0.25)["warmup_steps"] == 0.25
    assert arguments(CPU, warmup_steps=7)["warmup_steps"] == 7
    best = arguments(CPU, load_best_model_at_end=True, eval_strategy="epoch", eval_data=["e"])
    assert best["metric_for_best_model"] == "nDCG@10"
    assert not any(name in keywords for name in ("resume_from_checkpoint", "do_train"))
    assert trainer_spec().accumulation == 1 and trainer_spec(gradient_accumulation_steps=4).accumulation == 4


def test_a_pattern_of_modules_is_not_a_list():
    for value, expected in ((["all-linear"], "all-linear"), ([r".*attn.*"], ".*attn.*"), (["attn"], ["attn"])):
        assert arguments(CPU, optim_target_modules=value)["optim_target_modules"] == expected


def test_raybges_own_flags_are_none_of_the_trainers():
    own = {f.name for f in declared_flags(TrainOptions).values() if not f.transformers}
    assert not own & set(all_flags())
