"""Wrong values of the Trainer's flags are found before workers start, each under its flag's name."""

import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from tiny import make_tiny

import raybge
from raybge.cli.options import NO_EFFECT, REFUSED, TrainOptions
from raybge.cli.parser import build_options
from raybge.cli.training_arguments import training_argument_flags as all_flags
from raybge.cluster import connection
from raybge.training import run, trainer_check
from raybge.training.spec import TrainerSpec
from raybge.training.trainer_check import check_trainer
from raybge.training.worker import build_arguments
from raybge.tuning.spec import TuningSpec
from raybge.util.errors import UserError

ACCEPTED = {name: f for name, f in all_flags().items() if name not in REFUSED and name not in NO_EFFECT}
STEPS = {"eval_strategy": "steps", "eval_data": ["DATA"]}
COSINE = {"lr_scheduler_type": "cosine"}
# Values of a flag's own kind that are wrong, and the flags that it requires.
WRONG: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "output_dir": (["DATA", "s3://bucket/model"], {}),
    "per_device_train_batch_size": ([0, -8], {}),
    "num_train_epochs": ([0.0, -1.0, float("inf")], {}),
    "max_steps": ([0, -5], {}),
    "learning_rate": ([-1e-5, float("inf")], {}),
    "lr_scheduler_type": (["cosin", "warmup_stable_decay", "cosine_with_min_lr", ""], {}),
    "lr_scheduler_kwargs": ([{"num_cycle": 2}, {"num_cycles": "two"}, {"num_cycles": None}], COSINE),
    "warmup_steps": ([-3.0, float("inf")], {}),
    "optim": (["adamz", "adamw_apex_fused", "adamw_bnb_8bit", "lomo", "galore_adamw", "grokadamw"], {}),
    "optim_args": (["momentum", "momentum=x", "momentun=0.9"], {"optim": "sgd"}),
    "optim_target_modules": ([["attention"]], {}),
    "weight_decay": ([-0.1, float("inf")], {}),
    "adam_beta1": ([1.5, -0.1], {}),
    "adam_beta2": ([1.0, -0.1], {}),
    "adam_epsilon": ([-1e-8], {}),
    "gradient_accumulation_steps": ([0], {}),
    "max_grad_norm": ([-1.0], {}),
    "activation_checkpointing_kwargs": ([{"every_n_layers": 0}, {"use_reentrant": False, "layers": 2}], {}),
    "gradient_checkpointing_kwargs": ([{"offload": 1}, {"use_reentrant": False, "context_fn": 2}], {}),
    "torch_compile_backend": (["inducktor"], {}),
    "torch_compile_mode": (["fastest"], {}),
    "neftune_noise_alpha": ([-1.0, float("inf")], {}),
    "torch_empty_cache_steps": ([0], {}),
    "logging_strategy": (["step"], {}),
    "logging_steps": ([0.0, 1.5], {}),
    "include_num_input_tokens_seen": (["some"], {}),
    "log_level": (["loud"], {}),
    "log_level_replica": (["loud"], {}),
    "report_to": ([["paper"], ["neptune"], ["tensorboard", "paper"]], {}),
    "eval_strategy": (["step"], {"eval_data": ["DATA"]}),
    "eval_steps": ([0.0, -1.0, 2.5], STEPS),
    "eval_delay": ([-1.0], STEPS),
    "per_device_eval_batch_size": ([0], {}),
    "save_strategy": (["step"], {}),
    "save_steps": ([0.0, 2.5], {}),
    "save_total_limit": ([0, -1], {}),
    "metric_for_best_model": (["loss"], {}),
    "seed": ([-1], {}),
    "data_seed": ([-1], {}),
    "accelerator_config": (
        [
            {"split_batches": True},
            {"gradient_accumulation_kwargs": {"sync_each_batch": 1}},
            {"x": {}},
            {"gradient_accumulation_kwargs": True},
        ],
        {},
    ),
    "ddp_bucket_cap_mb": ([0], {}),
    "ddp_backend": (["glue", "cpu:gloo,cuda:nickel"], {}),
    "ddp_timeout": ([0], {}),
    "fsdp": (["full_shard auto_wrap"], {}),
    "fsdp_config": (
        [
            {"state_dict": "FULL"},
            {"state_dict_type": "WHOLE"},
            {"cpu_offload": "maybe"},
            {"auto_wrap_policy": "ALL"},
            {"reshard_after_forward": "maybe"},
            {"version": 1},
        ],
        {"fsdp": True},
    ),
    "deepspeed": ([{"zero_optimization": 2}, {"zero_optimization": {"stage": "two"}}, {"optimizer": "adam"}], {}),
    "debug": (["overflow"], {}),
    "resume_from_checkpoint": (["nowhere/checkpoint-3"], {}),
}
ANY_VALUE = {"run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"}
WRONG_TYPES: dict[str, list[Any]] = {
    "bool": [1, "perhaps", [True]],
    "int": [1.5, True, [1], "many"],
    "float": [True, [0.1], "much", float("nan")],
    "str": [["a"], {"a": 1}],
    "json": [["a"], 5, "{"],
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Return a function that makes the flags of a run which is right, with some more; DATA stands for a file."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "data.jsonl"
    data.write_text('{"query": "what", "pos": ["lane"], "neg": ["row"]}\n' * 8)
    model = make_tiny(folder / "tiny")

    def make(**more: Any) -> dict[str, Any]:
        needed = {"model_name_or_path": model, "train_data": [str(data)], "output_dir": str(folder / "out")}
        values = {"train_group_size": 2, **needed, **more}
        return {name: _replace(value, str(data)) for name, value in values.items()}

    return make


def _replace(value: Any, data: str) -> Any:
    return [_replace(each, data) for each in value] if isinstance(value, list) else data if value == "DATA" else value


@pytest.fixture(autouse=True)
def _no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RUNTIME", lambda: pytest.fail("workers would start"))


def check(**flags: Any) -> None:
    """Check the flags of the Trainer on a machine that joins no cluster."""
    needed = {"model_name_or_path": "m", "train_data": ["d"], "output_dir": "o"}
    check_trainer(TrainerSpec.from_options(build_options(TrainOptions, {**needed, **flags})), False)


def test_every_accepted_flag_has_wrong_values():
    assert ACCEPTED.keys() == WRONG.keys() | ANY_VALUE | {name for name, f in ACCEPTED.items() if f.kind == "bool"}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (values, _) in WRONG.items() for value in values], ids=str
)
def test_a_wrong_value_stops_before_workers_start(name, value, flags):
    with pytest.raises(UserError, match=rf"\b{name}\b"):
        raybge.finetune(**flags(**{**WRONG[name][1], name: value}))


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, f in ACCEPTED.items() for value in WRONG_TYPES[f.kind]], ids=str
)
def test_a_value_of_another_type_stops_before_workers_start(name, value, flags):
    if ACCEPTED[name].many and isinstance(value, list):
        value = [value]
    with pytest.raises(UserError, match=rf"\b{name}\b"):
        raybge.finetune(**flags(**{name: value}))


def test_a_right_run_would_start_workers(flags):
    with pytest.raises(pytest.fail.Exception, match="workers would start"):
        raybge.finetune(**flags())


@pytest.mark.parametrize(
    "right",
    [
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "eval_data": ["e"]},
        {"lr_scheduler_type": "greedy", "eval_strategy": "epoch", "eval_data": ["e"]},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}, "warmup_ratio": 0.1},
        *({"lr_scheduler_type": name} for name in ("linear", "cosine", "constant", "inverse_sqrt")),
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=True"},
        {"optim": "sgd", "optim_args": "momentum=0"},  # the default
        *({"optim": name} for name in ("adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop")),
        {"bf16": True, "tf32": True, "max_steps": 3},  # GPUs may be elsewhere
        {"fp16": True, "full_determinism": True},
        {"fsdp": True, "fsdp_config": {"fsdp_cpu_offload": True, "state_dict_type": "SHARDED_STATE_DICT"}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2, "offload": True}},
        {"report_to": "none", "debug": "underflow_overflow", "log_level": "info"},
        {"report_to": ["all"]},
        {"include_num_input_tokens_seen": True, "trackio_static_space_id": False, "ddp_backend": "cpu:gloo,cuda:nccl"},
        {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
        {"torch_compile_backend": "eager"},
    ],
    ids=str,
)
def test_right_values_pass(right):
    check(**right)


def test_the_cause_is_named_among_other_flags():
    """The schedule is right for its arguments; a flag that is right alone is wrong with another one."""
    kwargs = {"lr_scheduler_kwargs": {"num_decay_steps": 5}, "learning_rate": 1e-4, "optim": "sgd"}
    with pytest.raises(UserError, match="^--lr_scheduler_type wsd: wsd is not a valid SchedulerType"):
        check(lr_scheduler_type="wsd", **kwargs)
    with pytest.raises(UserError, match='^--lr_scheduler_kwargs {"num_decay_steps": 5}: the schedule linear has no'):
        check(lr_scheduler_type="linear", **kwargs)
    with pytest.raises(UserError, match="^--lr_scheduler_type polynomial|^--learning_rate 1e-08: lr_end"):
        check(lr_scheduler_type="polynomial", learning_rate=1e-8)
    check(lr_scheduler_type="warmup_stable_decay", **kwargs)
    two = {"optim": "adamz", "lr_scheduler_type": "cosin"}
    with pytest.raises(UserError, match="^--optim adamz|^--lr_scheduler_type cosin"):
        check(**two)
    with pytest.raises(UserError, match="--load_best_model_at_end requires the save and eval strategy to match"):
        check(load_best_model_at_end=True, eval_strategy="epoch", eval_data=["e"])


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"report_to": ["wandb"]}, "wandb"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "pip install deepspeed"),
    ],
)
def test_a_package_may_be_missing_where_the_workers_are_elsewhere(flags, package, monkeypatch):
    monkeypatch.setattr(trainer_check.importlib.util, "find_spec", lambda _: None)
    spec = TrainerSpec(flags, 0.0)
    check_trainer(spec, joins_cluster=True)
    with pytest.raises(UserError, match=f"^--{next(iter(flags))} .*{package}"):
        check_trainer(spec, joins_cluster=False)
    with pytest.raises(UserError, match="^--lr_scheduler_type cosin"):  # what else is wrong is found
        check_trainer(TrainerSpec({**flags, "lr_scheduler_type": "cosin"}, 0.0), joins_cluster=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"optim": "adamw_bnb_8bit"}, "^--optim: You need to install `bitsandbytes`"),
        ({"report_to": ["neptune"]}, "^--report_to: neptune is not installed; `pip install neptune`"),
    ],
)
def test_a_worker_names_the_missing_package(flags, message, tmp_path):
    config = SimpleNamespace(training={"output_dir": str(tmp_path), "use_cpu": True, **flags}, validation=None)
    with pytest.raises(UserError, match=message):
        build_arguments(config)
    config.training = {"output_dir": str(tmp_path), "use_cpu": True, "optim": "sgd"}
    assert build_arguments(config).optim == "sgd"


def test_a_run_joins_a_cluster_by_address_or_connection(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", type("Ray", (), {"is_initialized": staticmethod(lambda: False)}))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert not connection.joins_cluster() and not connection.joins_cluster("local")
    assert connection.joins_cluster("10.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert connection.joins_cluster()


def test_the_process_is_left_as_it_was():
    state = PartialState(cpu=True)
    before = dict(os.environ), dict(PartialState._shared_state), list(warnings.filters)
    check(torch_compile=True, fsdp=True, gradient_checkpointing=True)
    assert (dict(os.environ), dict(PartialState._shared_state), list(warnings.filters)) == before
    assert state.device.type == "cpu"


@pytest.mark.parametrize("searched", ["lr_scheduler_type=choice(linear,cosin)", "optim=choice(sgd,adamz)"])
def test_a_search_checks_each_value(searched, flags):
    from raybge.cli.options import TuneOptions

    options = build_options(TuneOptions, flags(search=[searched]))
    with pytest.raises(UserError, match=f"--search {searched.partition('=')[0]}=.*: --{searched.partition('=')[0]}"):
        TuningSpec.from_options(options)


def test_pretraining_checks_the_same_flags(flags, tmp_path: Path):
    texts = tmp_path / "t.jsonl"
    texts.write_text('{"text": "what is a lane"}\n' * 8)
    more = {"train_data": [str(texts)], "lr_scheduler_type": "cosin"}
    values = {name: value for name, value in flags(**more).items() if name != "train_group_size"}
    with pytest.raises(UserError, match="^lr_scheduler_type cosin"):
        raybge.pretrain_retromae(**values)


def test_the_command_ends_with_code_2_in_seconds(flags):
    """5 s on a quiet machine, most of them the import of torch: the test counts CPU time, which others do not take."""
    values = {**flags(optim="adamz"), "train_data": flags()["train_data"][0]}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    code = "import sys; from raybge.train import main; end = main(sys.argv[1:]); sys.exit(end + ('ray' in sys.modules))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15
    assert done.returncode == 2, done.stderr
    assert "raybge.train: --optim adamz: adamz is not a valid OptimizerNames" in done.stderr
