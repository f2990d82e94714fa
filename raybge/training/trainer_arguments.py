"""TrainingArguments of a worker: checks of the flags, and the arguments that the stream and the loss require.

Flags that are never accepted are in `REFUSED` of raybge/cli/options/training.py; here are the checks that depend on
other flags or on the plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.evaluation.metrics import METRICS
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.cluster.resources import Plan
    from raybge.data.order import Order
    from raybge.training.spec import TrainerSpec

# TrainingArguments that the driver acts on itself; the process group is started by Ray.
_NOT_FOR_WORKERS = ("resume_from_checkpoint", "do_train", "do_eval", "ddp_backend")
_ABOVE_0 = {
    *("gradient_accumulation_steps", "per_device_eval_batch_size", "logging_steps", "save_steps", "eval_steps"),
    *("save_total_limit", "torch_empty_cache_steps", "ddp_bucket_cap_mb", "ddp_timeout"),
}
_AT_LEAST_0 = {
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("neftune_noise_alpha", "warmup_steps", "eval_delay"),
}
_DEEPSPEED_SECTIONS = ("zero_optimization", "fp16", "bf16", "optimizer", "scheduler", "activation_checkpointing")
_BACKENDS = ("gloo", "nccl", "mpi", "ucc", "xccl")


def check_trainer_flags(flags: Mapping[str, Any], warmup_ratio: float, has_eval_data: bool) -> None:
    """Check the Trainer's flags by themselves; `training_arguments` checks them against the plan.

    Args:
        flags: flags of TrainingArguments that were given, by name.
        warmup_ratio: --warmup_ratio.
        has_eval_data: --eval_data was given.

    Raises:
        UserError: a flag out of range, without effect here, or that does not go together with another one.
    """
    for name, value in flags.items():
        if name in _ABOVE_0 and value is not None and value <= 0:
            raise UserError(f"--{name} must be above 0, found {value}")
        if name in _AT_LEAST_0 and value is not None and value < 0:
            raise UserError(f"--{name} must be at least 0, found {value}")
        if isinstance(value, float) and math.isinf(value):
            raise UserError(f"--{name} must be finite, found {value}")
    if (steps := flags.get("max_steps", -1)) < 1 and steps != -1:
        raise UserError(f"--max_steps must be at least 1, or -1 for --num_train_epochs; found {steps}")
    if not 0 <= warmup_ratio < 1:
        raise UserError(f"--warmup_ratio must be at least 0 and below 1, found {warmup_ratio:g}")
    if flags.get("num_train_epochs", 1) <= 0 and flags.get("max_steps", -1) <= 0:
        raise UserError(f"--num_train_epochs must be above 0, found {flags['num_train_epochs']}")
    if warmup_ratio and flags.get("warmup_steps"):
        raise UserError("--warmup_ratio and --warmup_steps set the same thing: give one")
    if flags.get("bf16") and flags.get("fp16"):
        raise UserError("--bf16 and --fp16 exclude each other: give one")
    _check_evaluation(flags, has_eval_data)
    _check_accelerator(flags.get("accelerator_config") or {})
    _check_deepspeed(flags.get("deepspeed") or {})
    _check_fsdp(flags)
    _check_backend(flags.get("ddp_backend"))


def training_arguments(trainer: TrainerSpec, plan: Plan, order: Order, output_dir: Path) -> dict[str, Any]:
    """Make the keyword arguments of a worker's TrainingArguments.

    Args:
        trainer: the flags, checked.
        plan: number of workers and the resources of each.
        order: order of the rows; a worker's batch is its share of the global batch.
        output_dir: folder of the Trainer's own files.

    Returns:
        The arguments by name.

    Raises:
        UserError: a flag that this plan cannot follow.
    """
    _check_plan(trainer.flags, plan)
    return {
        # Every parameter has a gradient in every step, except the frozen pooler.
        "ddp_find_unused_parameters": False,
        **worker_flags(trainer),
        **({} if plan.gpus else {"use_cpu": True, "fp16": False}),  # bf16 on a CPU: see `worker.build_arguments`
        "output_dir": str(output_dir),
        "per_device_train_batch_size": -(-order.global_batch // plan.workers),
        "ignore_data_skip": True,  # the stream starts at its position
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,  # a batch is ragged token ids, not tensors
        "disable_tqdm": True,
    }


def worker_flags(trainer: TrainerSpec) -> dict[str, Any]:
    """Return the keyword arguments of TrainingArguments that the flags set, whatever the plan.

    Args:
        trainer: the flags, checked.

    Returns:
        The arguments by name, in the form that transformers accepts.
    """
    flags = {name: value for name, value in trainer.flags.items() if name not in _NOT_FOR_WORKERS}
    if trainer.warmup_ratio:
        flags["warmup_steps"] = trainer.warmup_ratio
    if _selects_best(flags):
        flags.setdefault("metric_for_best_model", METRICS[0])
    return _in_transformers_form(flags)


def _in_transformers_form(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags with values in the form that transformers accepts."""
    changed = dict(flags)
    sharded = _fsdp(flags)
    if sharded:
        changed |= {"fsdp": True, "fsdp_config": flags.get("fsdp_config") or {}}
    elif sharded is False:
        del changed["fsdp"]
    counted = flags.get("include_num_input_tokens_seen")
    if counted is not None:
        # Batches have no padding: "all" counts the same tokens as "non_padding".
        names = {"true": "all", "non_padding": "all", "false": "no"}
        changed["include_num_input_tokens_seen"] = names.get(str(counted).lower(), counted)
    targets = flags.get("optim_target_modules")
    if isinstance(targets, list) and len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
        changed["optim_target_modules"] = targets[0]  # a pattern or "all-linear" must not be in a list
    if isinstance(flags.get("deepspeed"), dict):
        # DeepSpeed requires these sizes; transformers compares those that are set with the flags.
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        changed["deepspeed"] = {**dict.fromkeys(sizes, "auto"), **flags["deepspeed"]}
    return changed


def process_group(flags: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Make the arguments of Ray Train's TorchConfig: Ray starts the process group.

    Args:
        flags: flags of TrainingArguments that were given, by name.
        plan: the resources of each worker.

    Returns:
        Backend and timeout in seconds.

    Raises:
        UserError: a backend that requires GPUs, without any.
    """
    backend = flags.get("ddp_backend") or ("nccl" if plan.gpus else "gloo")
    if not plan.gpus and "nccl" in backend:
        raise UserError(f"--ddp_backend {backend} requires GPUs; workers without one communicate through gloo")
    return {"backend": backend, "timeout_s": int(flags.get("ddp_timeout", 1800))}


def _selects_best(flags: Mapping[str, Any]) -> bool:
    """Return whether the run depends on which evaluation was best."""
    return (
        bool(flags.get("load_best_model_at_end"))
        or flags.get("save_strategy") == "best"
        or flags.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    )


def _check_evaluation(flags: Mapping[str, Any], has_eval_data: bool) -> None:
    evaluates = flags.get("eval_strategy", "no") != "no"
    requests = [f"--eval_strategy {flags['eval_strategy']}"] if evaluates else []
    requests += [f"--{name}" for name in ("do_eval", "eval_on_start") if flags.get(name)]
    if requests and not has_eval_data:
        raise UserError(f"{requests[0]} requires --eval_data: queries with their answers")
    if _selects_best(flags) and not evaluates:
        name = next((n for n in ("load_best_model_at_end", "lr_scheduler_type") if flags.get(n)), "save_strategy")
        raise UserError(f"--{name} {flags[name]} requires --eval_strategy steps or epoch, and --eval_data")
    for name in ("eval_steps", "eval_delay"):
        if flags.get(name) and not evaluates:
            raise UserError(f"--{name} requires --eval_strategy steps or epoch")
    metric = flags.get("metric_for_best_model")
    if metric is not None and metric.removeprefix("eval_") not in METRICS:
        raise UserError(f"--metric_for_best_model must be one of {', '.join(METRICS)}, found «{metric}»")


def _check_accelerator(config: Mapping[str, Any]) -> None:
    supported = {"gradient_accumulation_kwargs": ("sync_each_batch",)}
    for name, value in config.items():
        if name not in supported:
            raise UserError(
                f"--accelerator_config {name} cannot be used: it configures accelerate's data loaders, and Ray Data "
                "reads here; only gradient_accumulation_kwargs has an effect"
            )
        if not isinstance(value, dict):
            raise UserError(f"--accelerator_config {name} must be a JSON object, found {value!r}")
        for key, setting in value.items():
            if key not in supported[name]:
                raise UserError(
                    f"--accelerator_config {name}.{key} cannot be used: only sync_each_batch has an effect here"
                )
            if not isinstance(setting, bool):
                raise UserError(f"--accelerator_config {name}.{key} must be true or false, found {setting!r}")


def _check_deepspeed(config: Mapping[str, Any]) -> None:
    for name in _DEEPSPEED_SECTIONS:
        if not isinstance(config.get(name, {}), dict):
            raise UserError(f"--deepspeed: {name} must be a JSON object, found {config[name]!r}")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"--deepspeed: zero_optimization.stage must be 0, 1 or 2, found {stage!r}")
    if stage == 3:
        raise UserError(
            "--deepspeed: ZeRO stage 3 gathers weights layer by layer, in step with all workers, and workers run "
            "different numbers of chunks; --fsdp True shards weights too, stages 0 to 2 shard the rest"
        )


def _fsdp(flags: Mapping[str, Any]) -> bool | None:
    """Return whether --fsdp is on; None if it is unset. transformers would read the text «True» as an option."""
    value = flags.get("fsdp")
    return None if value is None else str(value).lower() not in ("", "false", "no", "0", "[]")


def _check_fsdp(flags: Mapping[str, Any]) -> None:
    config = flags.get("fsdp_config") or {}
    if config and not _fsdp(flags):
        raise UserError("--fsdp_config requires --fsdp True")
    if not _fsdp(flags):
        return
    if str(flags["fsdp"]).lower() not in ("true", "1", "yes"):
        raise UserError(f"--fsdp must be True or False, found «{flags['fsdp']}»; its options belong in --fsdp_config")
    if flags.get("deepspeed"):
        raise UserError("--fsdp and --deepspeed both shard the model: give one")
    for key, value in config.items():
        _check_fsdp_option(key, value)


def _check_fsdp_option(key: str, value: Any) -> None:
    name = key.removeprefix("fsdp_")
    if value == "SIZE_BASED_WRAP" or (name == "min_num_params" and value):
        raise UserError(
            f"--fsdp_config {key} {value} cannot be used: units are layers (TRANSFORMER_BASED_WRAP, the default), or "
            "the whole model (NO_WRAP)"
        )
    if name == "version" and str(value) != "2":
        raise UserError(f"--fsdp_config {key} {value} cannot be used: transformers drops it; use 2")
    if name.startswith("xla") and value:
        raise UserError(f"--fsdp_config {key} cannot be used: Ray Train runs PyTorch's own process group, not XLA")


def _check_backend(backend: str | None) -> None:
    """Check --ddp_backend: a name such as gloo, or one for each device such as cpu:gloo,cuda:nccl."""
    names = [each.rpartition(":")[2] for each in (backend or "").split(",") if each]
    for name in names:
        if name not in _BACKENDS:
            raise UserError(f"--ddp_backend must be one of {', '.join(_BACKENDS)}, found «{backend}»")


def _check_plan(flags: Mapping[str, Any], plan: Plan) -> None:
    for name in ("fsdp", "deepspeed"):
        if (_fsdp(flags) if name == "fsdp" else flags.get(name)) and not plan.gpus:
            raise UserError(f"--{name} requires GPUs: on CPUs transformers would silently train without it")
    if _fsdp(flags) and plan.workers < 2:
        raise UserError("--fsdp requires at least 2 workers, found 1: raise --num_workers")
    if flags.get("tf32") and not plan.gpus:
        raise UserError("--tf32 requires GPUs")
