"""Check the Trainer's flags before workers start: build what each worker will build, on the CPU and without a model.

`check_trainer` makes the TrainingArguments, optimizer, learning-rate schedule, loggers, activation checkpointing and
compiler settings with one parameter that has no memory, and runs some steps of the schedule. The driver may differ from
the workers, so two things are left to them:

- Precision, FSDP and DeepSpeed depend on GPUs, which the driver may lack: their values are checked here (for FSDP by
  building accelerate's plugin), that the hardware supports them by the plan (`trainer_arguments`) and by each worker.
- A package that is not installed here may be installed where the workers run: if the run joins a cluster, its absence
  is no error here; the first worker reports it.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raybge.training.trainer_arguments import worker_flags
from raybge.util.errors import UserError, first_line
from raybge.util.process_state import preserve_environment

if TYPE_CHECKING:
    import transformers
    from torch import nn

    from raybge.training.spec import TrainerSpec

STEPS = 1000  # of the schedule if --max_steps is unset: the number of rows may not be known yet
STEPS_RUN = 20
# They depend on the hardware of the workers.
_LEFT_OUT = ("fp16", "bf16", "tf32", "deepspeed")
# Flags that mean something only together with another one.
_DEPENDENT = {
    "optim": ("optim_args", "optim_target_modules"),
    "lr_scheduler_type": ("lr_scheduler_kwargs",),
    "fsdp": ("fsdp_config",),
}
# Of FSDP version 2, without the prefix `fsdp_`; transformers ignores all others.
_FSDP_OPTIONS = {
    *("version", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params", "reshard_after_forward"),
    *("cpu_offload", "cpu_ram_efficient_loading", "state_dict_type", "activation_checkpointing"),
    *("mixed_precision_policy", "xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"),
}
_TAKES_MODULES = re.compile(r"galore|apollo")
_NEED_MODEL = re.compile(r"galore|apollo|(ada)?lomo")  # only their package is checked


class _MissingPackageError(Exception):
    pass


def check_trainer(trainer: TrainerSpec, joins_cluster: bool) -> None:
    """Build what the workers will build from the Trainer's flags. Imports torch and transformers, which takes seconds.

    Args:
        trainer: the flags, each checked by itself.
        joins_cluster: workers run in a cluster, whose machines may have packages that this one lacks.

    Raises:
        UserError: a flag that the Trainer, an optimizer, a schedule or a logger refuses, or a missing package.
    """
    flags = worker_flags(trainer)
    with undisturbed():
        while (error := _failure(flags)) is not None:
            name = _cause(flags, error)
            if name is None:
                raise UserError(f"transformers.TrainingArguments: {first_line(error)}") from error
            if not (joins_cluster and isinstance(error, _MissingPackageError)):
                value = flags[name] if isinstance(flags[name], str) else json.dumps(flags[name], default=str)
                raise UserError(f"--{name} {value[:80]}: {first_line(error)}") from error
            flags = _without(flags, name, *_DEPENDENT.get(name, ()))


def check_packages(args: transformers.TrainingArguments) -> None:
    """Check on a worker that the packages of its optimizer and its loggers are installed.

    Args:
        args: the worker's arguments.

    Raises:
        UserError: one is missing; the message states the flag.
    """
    import torch

    model = torch.nn.Linear(1, 1, device="meta")
    for flag, check in (("report_to", _check_loggers), ("optim", lambda args: _build_optimizer(args, model))):
        try:
            check(args)
        except _MissingPackageError as error:
            raise UserError(f"--{flag}: {first_line(error)}") from error


def _cause(flags: Mapping[str, Any], error: Exception) -> str | None:
    """Return the flag without which the build succeeds or, if there are several errors, that causes this one alone."""
    names = sorted(flags, key=lambda name: name in _DEPENDENT)  # details first
    for dependent in ({}, _DEPENDENT):
        for name in names:
            if _failure(_without(flags, name, *dependent.get(name, ()))) is None:
                return name
    return next((name for name in names if str(_failure({name: flags[name]})) == str(error)), None)


def _without(flags: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if name not in names}


def _failure(flags: Mapping[str, Any]) -> Exception | None:
    try:
        _build(flags)
    except Exception as error:  # of any kind: libraries check little, and the first use of a wrong value fails
        return error
    return None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep environment, warnings and accelerate's state as they are: TrainingArguments change them for a worker."""
    from raybge.compat.transformers import preserve_accelerate_state

    with preserve_environment(), preserve_accelerate_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- build ------------------------------------------------------------------------------------------------------------


def _build(flags: Mapping[str, Any]) -> None:
    import torch
    import transformers

    deepspeed = flags.get("deepspeed")
    flags = copy.deepcopy(_without(flags, *_LEFT_OUT))  # TrainingArguments change dictionaries
    args = transformers.TrainingArguments(**{**flags, "output_dir": ".", "use_cpu": True})
    model = torch.nn.Linear(1, 1, device="meta")
    _check_names(args)
    _check_loggers(args)
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise _MissingPackageError("DeepSpeed is not installed; `pip install deepspeed` where the workers run")
    optimizer = _build_optimizer(args, model)
    _build_schedule(args, optimizer)
    _checkpoint_activations(args.activation_checkpointing_kwargs or {})
    if args.torch_compile:
        _compile(args)
    if args.fsdp_plugin_args:
        _build_fsdp(args)


def _build_optimizer(args: transformers.TrainingArguments, model: nn.Module) -> Any:
    import torch
    import transformers

    get = transformers.Trainer.get_optimizer_cls_and_kwargs
    if args.optim_target_modules and not _TAKES_MODULES.match(args.optim):
        raise ValueError("only the optimizers galore_... and apollo_... take modules")
    groups = [{"params": list(model.parameters()), "weight_decay": args.weight_decay}]
    try:
        kind, keywords = get(args, model)
    except ImportError as error:
        raise _MissingPackageError(error) from error
    except ValueError as error:
        if re.search(r"install|failed to import", str(error)):
            raise _MissingPackageError(error) from error
        if _NEED_MODEL.match(args.optim) and args.optim_target_modules:
            return torch.optim.SGD(groups, args.learning_rate)
        raise
    for name, _, value in (each.partition("=") for each in (args.optim_args or "").split(",") if each.strip()):
        probe = copy.copy(args)
        probe.optim_args = f"{name}=-{value}7"  # another value, or none that can be read
        if _optimizer_of(probe, model) == repr((kind, keywords)):
            raise ValueError(f"{args.optim.value} has no argument «{name.strip()}»")
    if _NEED_MODEL.match(args.optim):
        return torch.optim.SGD(groups, args.learning_rate)
    return kind(groups, **keywords)


def _optimizer_of(args: transformers.TrainingArguments, model: nn.Module) -> str:
    import transformers

    try:
        return repr(transformers.Trainer.get_optimizer_cls_and_kwargs(args, model))
    except ValueError as error:
        return str(error)


def _build_schedule(args: transformers.TrainingArguments, optimizer: Any) -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

    name, keywords = args.lr_scheduler_type, args.lr_scheduler_kwargs or {}
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters.values()
    own = [p for p in parameters if p.name not in ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")]
    accepted = {p.name for p in own if p.kind is not p.VAR_KEYWORD}
    required = {p.name for p in own if p.kind is not p.VAR_KEYWORD and p.default is p.empty}
    takes_any = len(accepted) < len(own)
    listed = f"it takes {', '.join(sorted(accepted))}" if accepted else "it takes none"
    if missing := sorted(required - keywords.keys()):
        raise ValueError(f"it requires {', '.join(missing)} in --lr_scheduler_kwargs; {listed}")
    if unknown := sorted(keywords.keys() - accepted) if not takes_any else []:
        raise ValueError(f"the schedule {name.value} has no argument «{unknown[0]}»; {listed}")
    steps = args.max_steps if args.max_steps > 0 else STEPS
    warmup = args.get_warmup_steps(steps)
    schedule = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    takes_metric = "metrics" in inspect.signature(schedule.step).parameters
    for _ in range(STEPS_RUN):
        schedule.step(*([0.5] if takes_metric else []))


def _check_names(args: transformers.TrainingArguments) -> None:
    """Check names that the Trainer looks up later."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.utils import logging

    choices = {
        "log_level": {*logging.get_log_levels_dict(), "passive"},
        "log_level_replica": {*logging.get_log_levels_dict(), "passive"},
        "include_num_input_tokens_seen": {"all", "non_padding", "no"},
        "report_to": {*INTEGRATION_TO_CALLBACK, "none", "all"},
    }
    for flag, names in choices.items():
        value = getattr(args, flag)
        for each in value if isinstance(value, list) else [value]:
            if each not in names:
                raise ValueError(f"it must be one of {', '.join(sorted(names))}")


def _check_loggers(args: transformers.TrainingArguments) -> None:
    from transformers.integrations import get_available_reporting_integrations

    for name in {*args.report_to} - {*get_available_reporting_integrations()}:
        raise _MissingPackageError(f"{name} is not installed; `pip install {name.replace('_', '-')}`")


def _checkpoint_activations(options: Mapping[str, Any]) -> None:
    import torch
    from torch.utils.checkpoint import checkpoint

    layers, offload = options.get("every_n_layers", 1), options.get("offload", False)
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise ValueError(f"every_n_layers must be at least 1, found {layers!r}")
    if not isinstance(offload, bool):
        raise ValueError(f"offload must be true or false, found {offload!r}")
    keywords = {name: value for name, value in options.items() if name not in ("every_n_layers", "offload")}
    checkpoint(torch.sin, torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **keywords})


def _compile(args: transformers.TrainingArguments) -> None:
    import torch
    from accelerate.utils import TorchDynamoPlugin

    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    TorchDynamoPlugin(backend=backend, mode=mode)  # names that accelerate knows
    try:
        torch.compile(torch.nn.Identity(), backend=backend, mode=mode)
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ImportError) or str(error).startswith("Invalid backend"):
            raise _MissingPackageError(error) from error
        raise


def _build_fsdp(args: transformers.TrainingArguments) -> None:
    from accelerate import FullyShardedDataParallelPlugin

    if unknown := sorted({*args.fsdp_config} - _FSDP_OPTIONS):
        raise ValueError(f"there is no option «{unknown[0]}»")
    for name in ("cpu_offload", "cpu_ram_efficient_loading"):
        if str(args.fsdp_config.get(name, False)).lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, found {args.fsdp_config[name]!r}")
    FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
