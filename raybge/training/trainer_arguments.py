"""TrainingArguments for a worker: what was given, what cannot be, and what the stream and the loss need beside it.

Which flags are refused altogether is said in `arguments.py`; here are those that depend on other flags or on the plan.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.cli.options import LoopOptions
    from raybge.cluster.resources import Plan
    from raybge.data.order import Order

METRICS = ("nDCG@10", "MRR@10")  # what evaluation while training measures
# TrainingArguments that the driver acts on itself; it is Ray that starts the process group.
_NOT_FOR_WORKERS = ("resume_from_checkpoint", "do_train", "do_eval", "ddp_backend")


def check(arguments: LoopOptions) -> None:
    """What can be said of the flags alone. Raises UserError."""
    _check_rows(arguments)
    given = arguments.training
    for name in ("gradient_accumulation_steps", "per_device_eval_batch_size", "logging_steps", "save_steps"):
        if given.get(name) is not None and given[name] <= 0:
            raise UserError(f"--{name} must be above 0, found {given[name]}")
    if given.get("num_train_epochs", 1) <= 0 and given.get("max_steps", -1) <= 0:
        raise UserError(f"--num_train_epochs must be above 0, found {given['num_train_epochs']}")
    if arguments.max_failures < -1:
        raise UserError(f"--max_failures must be at least -1 (no limit), found {arguments.max_failures}")
    if arguments.stall_timeout < 0:
        raise UserError(f"--stall_timeout must be at least 0 (off), found {arguments.stall_timeout}")
    if arguments.max_bad_steps < 0:
        raise UserError(f"--max_bad_steps must be at least 0 (off), found {arguments.max_bad_steps}")
    if arguments.warmup_ratio and given.get("warmup_steps"):
        raise UserError("--warmup_ratio and --warmup_steps say the same thing: give one")
    if given.get("bf16") and given.get("fp16"):
        raise UserError("--bf16 and --fp16: give one")
    _check_evaluation(arguments)
    _check_accelerator(given.get("accelerator_config") or {})
    _check_deepspeed(given.get("deepspeed"))
    _check_fsdp(given)
    _check_reporting(given.get("report_to"))


def _check_rows(arguments: LoopOptions) -> None:
    """How many rows, and of what."""
    from raybge.data.datasets import parse_weights

    at_least_1 = {name: getattr(arguments, name) for name in ("max_example_num_per_dataset", "global_batch_size")}
    at_least_1["per_device_train_batch_size"] = arguments.training.get("per_device_train_batch_size")
    for name, value in at_least_1.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}")
    for name in ("small_threshold", "drop_threshold"):
        if getattr(arguments, name) < 0:
            raise UserError(f"--{name} must be at least 0, found {getattr(arguments, name)}")
    parse_weights(arguments.dataset_weights or [])


def training_arguments(arguments: LoopOptions, plan: Plan, order: Order, storage: Path) -> dict[str, Any]:
    """TrainingArguments for a worker. Raises UserError for what this plan cannot do."""
    given = {name: value for name, value in arguments.training.items() if name not in _NOT_FOR_WORKERS}
    _check_plan(given, plan)
    if not plan.gpus:
        given |= {"use_cpu": True, "fp16": False, "bf16": False}
    if arguments.warmup_ratio:
        given["warmup_steps"] = arguments.warmup_ratio
    if _chooses(given):
        given.setdefault("metric_for_best_model", METRICS[0])
    if sharding := _fsdp(given):
        given |= {"fsdp": True, "fsdp_config": {**(given.get("fsdp_config") or {}), "auto_wrap_policy": "NO_WRAP"}}
    elif sharding is not None:
        given.pop("fsdp")
    counted = given.get("include_num_input_tokens_seen")
    if counted is not None:
        given["include_num_input_tokens_seen"] = {"true": "all", "false": "no"}.get(str(counted).lower(), counted)
    targets = given.get("optim_target_modules")
    if isinstance(targets, list) and len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
        given["optim_target_modules"] = targets[0]  # a pattern or «all-linear»: transformers wants it by itself
    if isinstance(given.get("deepspeed"), dict):
        # What the file leaves out, DeepSpeed would ask for; what it says, transformers compares with the flags.
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        given["deepspeed"] = {**dict.fromkeys(sizes, "auto"), **given["deepspeed"]}
    return {
        # The frozen pooler aside, every parameter has a gradient in every step.
        "ddp_find_unused_parameters": False,
        **given,
        "output_dir": str(storage),
        "per_device_train_batch_size": -(-order.global_batch // plan.workers),
        "ignore_data_skip": True,  # the stream knows its position
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,  # a batch is ragged token ids, not tensors
        "disable_tqdm": True,
    }


def accumulation(arguments: LoopOptions) -> int:
    """Steps of the stream that make one update."""
    return int(arguments.training.get("gradient_accumulation_steps", 1))


def process_group(arguments: LoopOptions, plan: Plan) -> dict[str, Any]:
    """The arguments of Ray Train's TorchConfig: it is Ray that starts the process group."""
    backend = arguments.training.get("ddp_backend") or ("nccl" if plan.gpus else "gloo")
    if not plan.gpus and "nccl" in backend:
        raise UserError(f"--ddp_backend {backend} needs GPUs; workers without one talk through gloo")
    return {"backend": backend, "timeout_s": int(arguments.training.get("ddp_timeout", 1800))}


def _chooses(given: dict[str, Any]) -> bool:
    """Whether something depends on which of the evaluations was best."""
    return (
        bool(given.get("load_best_model_at_end"))
        or given.get("save_strategy") == "best"
        or given.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    )


def _check_evaluation(arguments: LoopOptions) -> None:
    given = arguments.training
    evaluates = given.get("eval_strategy", "no") != "no"
    asking = [f"--eval_strategy {given['eval_strategy']}"] if evaluates else []
    asking += [f"--{name}" for name in ("do_eval", "eval_on_start") if given.get(name)]
    if asking and not getattr(arguments, "eval_data", None):
        raise UserError(f"{asking[0]} needs --eval_data: queries with their answers")
    if _chooses(given) and not evaluates:
        name = next((n for n in ("load_best_model_at_end", "lr_scheduler_type") if given.get(n)), "save_strategy")
        raise UserError(f"--{name} {given[name]} needs --eval_strategy steps or epoch, and --eval_data")
    for name in ("eval_steps", "eval_delay"):
        if given.get(name) and not evaluates:
            raise UserError(f"--{name} needs --eval_strategy steps or epoch")
    metric = given.get("metric_for_best_model")
    if metric is not None and metric.removeprefix("eval_") not in METRICS:
        raise UserError(f"--metric_for_best_model takes one of {', '.join(METRICS)}, found «{metric}»")


def _check_accelerator(config: dict[str, Any]) -> None:
    acts = {"gradient_accumulation_kwargs": ("sync_each_batch",)}
    for name, value in config.items():
        inner = value if name in acts and isinstance(value, dict) else {}
        for key in inner:
            if key not in acts[name]:
                raise UserError(f"--accelerator_config {name}.{key} cannot be used: only sync_each_batch acts here")
        if name not in acts:
            raise UserError(
                f"--accelerator_config {name} cannot be used: it is about accelerate's data loaders, and Ray Data "
                "reads here; gradient_accumulation_kwargs is what acts"
            )


def _check_deepspeed(config: Any) -> None:
    if not config:
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("--deepspeed: DeepSpeed is not installed; `pip install deepspeed` where the workers run")
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else {}
    if zero.get("stage") == 3:
        raise UserError(
            "--deepspeed: ZeRO stage 3 gathers weights layer by layer, in step with all workers, and workers run "
            "different numbers of chunks; --fsdp True shards weights too, stages 0 to 2 shard the rest"
        )


def _fsdp(given: dict[str, Any]) -> bool | None:
    """Whether --fsdp is on; None where it was not given. transformers reads «True» out of a text as an option."""
    value = given.get("fsdp")
    return None if value is None else str(value).lower() not in ("", "false", "no", "0", "[]")


def _check_fsdp(given: dict[str, Any]) -> None:
    config = given.get("fsdp_config") or {}
    if config and not _fsdp(given):
        raise UserError("--fsdp_config needs --fsdp True")
    if not _fsdp(given):
        return
    if str(given["fsdp"]).lower() not in ("true", "1", "yes"):
        raise UserError(f"--fsdp takes True or False, found «{given['fsdp']}»; its options belong into --fsdp_config")
    if given.get("deepspeed"):
        raise UserError("--fsdp and --deepspeed both shard the model: give one")
    for key, value in config.items():
        name = key.removeprefix("fsdp_")
        if name in ("auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params") and value not in (
            "NO_WRAP",
            0,
            None,
        ):
            raise UserError(
                f"--fsdp_config {key} cannot be used: weights gathered layer by layer need all workers in step, and "
                "workers run different numbers of chunks; the model is sharded as a whole"
            )
        if name == "version" and str(value) != "2":
            raise UserError(f"--fsdp_config {key} {value} cannot be used: transformers gives it up; use 2")
        if name.startswith("xla") and value:
            raise UserError(f"--fsdp_config {key} cannot be used: Ray Train runs PyTorch's own process group, not XLA")


def _check_reporting(report_to: list[str] | str | None) -> None:
    names = [report_to] if isinstance(report_to, str) else report_to or []
    names = [name for name in names if name not in ("none", "all")]
    if not names:
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"--report_to takes none, all, or some of {known}; found «{name}»")
        if name not in get_available_reporting_integrations():
            raise UserError(f"--report_to {name}: it is not installed; `pip install {name.replace('_', '-')}`")


def _check_plan(given: dict[str, Any], plan: Plan) -> None:
    for name in ("fsdp", "deepspeed"):
        if (_fsdp(given) if name == "fsdp" else given.get(name)) and not plan.gpus:
            raise UserError(f"--{name} needs GPUs: on CPUs transformers would train without it and say nothing")
    if _fsdp(given) and plan.workers < 2:
        raise UserError("--fsdp shards the model over workers, and there is 1: see --num_workers")
    if given.get("tf32") and not plan.gpus:
        raise UserError("--tf32 needs GPUs")
