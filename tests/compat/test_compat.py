"""Contracts of private names: each exists in the installed version and behaves as raybge.compat expects."""

import ast
import importlib
import inspect
import pickle
import re
import sys
import types
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers

import raybge
from raybge.compat import ray as compat_ray
from raybge.compat import torch as compat_torch
from raybge.compat import transformers as compat_transformers
from raybge.compat.library_versions import UnsupportedVersionError

LIBRARIES = ("ray", "torch", "transformers", "accelerate")
PACKAGE = Path(raybge.__file__).parent


# --- private names are used in raybge.compat only ---------------------------------------------------------------------


def private_names(source: str) -> list[str]:
    """Private modules and attributes of the libraries in a module; overrides through super() are exempt."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            names += [f"{node.lineno}: {node.module}"] * any(part.startswith("_") for part in parts)
        if isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".") if alias.name.startswith(LIBRARIES)]
            names += [f"{node.lineno}: {parts}"] * any(part.startswith("_") for part in parts)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            value = ast.unparse(node.value)
            if value not in ("self", "cls") and not value.startswith("super("):  # of a class that raybge extends
                names.append(f"{node.lineno}: {ast.unparse(node)}")
    return names


def test_private_names_of_libraries_are_used_in_compat_only():
    assert private_names(
        "from ray._private import x\nmodel.config._attn\nimport torch._dynamo\nself._a\nsuper()._b()"
    ) == [
        "1: ray._private",
        "3: ['torch', '_dynamo']",
        "2: model.config._attn",
    ]
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "compat"]
    uses = {str(path.relative_to(PACKAGE)): private_names(path.read_text()) for path in paths}
    assert {path: names for path, names in uses.items() if names} == {}


def test_compat_imports_nothing_of_raybge():
    for path in (PACKAGE / "compat").glob("*.py"):
        imports = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = [ast.unparse(node) for node in imports]
        assert not [name for name in names if "raybge" in name and "raybge.compat" not in name], path.name


# --- torch: optimizers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD], ids=lambda make: make.__name__)
def test_a_fused_optimizer_leaves_out_a_step_and_others_say_that_they_cannot(make):
    """The weights of steps 1 and 3, although step 2 has a gradient that is not finite, equal those without step 2."""

    def weights(gradients: list[float], fused: bool = True) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = make([parameter], lr=0.1, weight_decay=0.1, fused=fused)
        for value in gradients:
            parameter.grad = torch.full((3,), value)
            flag = 1 - parameter.grad.norm().isfinite().float()
            assert compat_torch.skip_step_where(optimizer, flag) is fused
            optimizer.step()
        return parameter.detach()

    assert torch.equal(weights([1.0, float("nan"), 2.0]), weights([1.0, 2.0]))
    assert torch.equal(weights([float("inf"), 2.0]), weights([2.0]))
    weights([1.0], fused=False)


# --- Ray --------------------------------------------------------------------------------------------------------------


def expect(module: str, name: str) -> object:
    """Return a private name, or fail with what to do."""
    advice = f"{module}.{name} is gone: find its successor and change raybge/compat"
    try:
        parent = importlib.import_module(module)
    except ImportError:
        pytest.fail(advice)
    assert hasattr(parent, name), advice
    return getattr(parent, name)


def test_ray_reads_the_constant_for_its_ports(monkeypatch):
    constants = importlib.import_module("ray._private.ray_constants")
    expect("ray._private.ray_constants", "ENABLE_RAY_CLUSTER")
    monkeypatch.setattr(constants, "ENABLE_RAY_CLUSTER", True)
    with compat_ray.ports_on_loopback():
        assert constants.ENABLE_RAY_CLUSTER is False
    assert constants.ENABLE_RAY_CLUSTER is True
    services = inspect.getsource(importlib.import_module("ray._private.services"))
    assert "ray_constants.ENABLE_RAY_CLUSTER" in services, "Ray reads another constant: its ports would be open"


def test_the_trainer_has_neither_cleaner_nor_data_actor():
    from ray.train import ScalingConfig

    def names(trainer: object) -> list[str]:
        return [type(each).__name__ for each in trainer._create_default_callbacks()]

    from ray.train.torch import TorchTrainer

    shipped, ours = (
        names(kind(lambda: None, scaling_config=ScalingConfig(num_workers=1)))
        for kind in (TorchTrainer, compat_ray.torch_trainer_without_helpers())
    )
    assert {"DatasetsCallback", "PlacementGroupCleanerCallback"} <= {*shipped}
    replaced = [each for each in shipped if each not in ("DatasetsCallback", "PlacementGroupCleanerCallback")]
    assert ours == [*replaced, "DataContextCallback"]


def test_the_autoscaler_reports_starting_machines():
    assert callable(expect("ray.autoscaler.v2.utils", "is_autoscaler_v2"))
    assert callable(expect("ray.autoscaler.v2.sdk", "get_cluster_status"))
    status = expect("ray.autoscaler.v2.schema", "ClusterStatus")
    assert {"pending_nodes", "pending_launches"} <= {*status.__dataclass_fields__}


def test_trials_get_no_keys_of_the_driver(monkeypatch):
    """Ray Tune puts a driver's variables into the runtime environment of its trials, which Ray logs."""
    cache = importlib.import_module("ray.tune.execution.class_cache")
    names = expect("ray.tune.execution.class_cache", "ENV_VARS_TO_PROPAGATE")
    monkeypatch.setattr(cache, "ENV_VARS_TO_PROPAGATE", set(names))  # restored after the test
    monkeypatch.setattr(cache.ray, "remote", lambda runtime_env: lambda trainable: runtime_env["env_vars"])
    secrets = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
    for name in secrets | {cache.RAY_CHDIR_TO_TRIAL_DIR}:
        monkeypatch.setenv(name, "1")

    def variables() -> set[str]:
        return {*expect("ray.tune.execution.class_cache", "_ActorClassCache")().get(object)}

    assert secrets <= variables(), "Ray Tune passes no keys any more: keys_out_of_trials is not needed"
    with compat_ray.keys_out_of_trials():
        rest = variables()
    assert secrets <= variables()
    assert cache.RAY_CHDIR_TO_TRIAL_DIR in rest
    assert not [name for name in rest if re.search("AWS|KEY|TOKEN|SECRET|PASSWORD", name)]


# --- torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "_flash_attention_forward",
            "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask scale",
        ),
        (
            "_efficient_attention_forward",
            "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p custom_mask_type "
            "compute_log_sumexp scale",
        ),
    ],
)
def test_attention_kernels_have_their_arguments_and_a_gradient(name, arguments):
    """Whether they compute attention is checked for each model that is trained on a GPU (raybge/model/packing.py)."""
    schema = getattr(torch.ops.aten, name).default._schema
    assert [argument.name for argument in schema.arguments][: len(arguments.split())] == arguments.split()
    assert schema.returns[0].type.kind() == "TensorType"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Autograd")


@pytest.mark.parametrize("attend", [compat_torch.flash_attention, compat_torch.efficient_attention])
def test_a_missing_attention_kernel_is_named_with_versions(attend, monkeypatch):
    monkeypatch.setattr(torch.ops, "aten", types.SimpleNamespace(__name__="torch.ops.aten"))
    x_THD = torch.zeros(3, 2, 8)
    with pytest.raises(UnsupportedVersionError, match=r"^torch 2.* has no torch.ops.aten._\w+, .*: install torch"):
        attend(x_THD, x_THD, x_THD, torch.tensor([0, 3], dtype=torch.int32), 3, 0.0, None, False)


def test_gradient_of_a_softmax_is_that_of_autograd(monkeypatch):
    torch.manual_seed(0)
    x, grad = torch.randn(3, 4, 9, requires_grad=True), torch.randn(3, 4, 9)
    softmax = x.softmax(-1)
    (expected,) = torch.autograd.grad(softmax, x, grad)
    assert torch.equal(compat_torch.softmax_backward(grad, softmax.detach()), expected)
    assert expected.norm() > 0.1
    monkeypatch.setattr(torch.ops, "aten", types.SimpleNamespace(__name__="torch.ops.aten"))
    with pytest.raises(
        UnsupportedVersionError, match=r"has no torch.ops.aten._softmax_backward_data, .*: install torch"
    ):
        compat_torch.softmax_backward(grad, softmax)


def test_a_scheduler_without_logged_rates_is_named_with_versions():
    scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)]))
    compat_torch.set_logged_rates(scheduler, [0.5])
    assert scheduler.get_last_lr() == [0.5]
    with pytest.raises(UnsupportedVersionError, match=r"^torch 2.* has no .*_last_lr, .*: install torch"):
        compat_torch.set_logged_rates(types.SimpleNamespace(), [0.5])


def test_compiled_modules_have_the_prefix():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    module[0] = torch.compile(module[0], backend="eager")
    assert {*module.state_dict()} == {f"0.{compat_torch.COMPILED_PREFIX}{name}" for name in ("weight", "bias")}


def test_the_names_in_an_index_exist():
    for module, names in compat_torch.SHARDED_INDEX_NAMES.items():
        if module != "pathlib._local" or sys.version_info >= (3, 13):
            assert [callable(expect(module, name)) for name in names] == [True] * len(names)


def test_an_index_has_these_names_only(tmp_path):
    """The index of tensors in several types, as FSDP's checkpoints have it."""
    tensors = {str(dtype): torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)}
    dcp.save(tensors | {"value": 1}, storage_writer=dcp.FileSystemWriter(str(tmp_path)), no_dist=True)
    names: dict[str, set[str]] = {}

    class Recorder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            names.setdefault(module, set()).add(name)
            return super().find_class(module, name)

    with open(tmp_path / ".metadata", "rb") as index:
        Recorder(index).load()
    names["torch"] -= {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    allowed = compat_torch.SHARDED_INDEX_NAMES
    assert {module: more for module, own in names.items() if (more := own - {*allowed.get(module, ())})} == {}


def test_the_classes_of_deepspeed_exist():
    pytest.importorskip("deepspeed", reason="an optional package")
    for module, names in compat_torch.DEEPSPEED_CLASSES.items():
        assert [expect(module, name) for name in names]


def test_the_rates_that_are_logged_are_set():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    compat_torch.set_logged_rates(scheduler, [0.25])
    assert scheduler.get_last_lr() == [0.25]


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_of_a_model_is_known(name):
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    model = transformers.BertModel(config)
    model.set_attn_implementation(name)
    assert compat_transformers.attention_implementation(model) == name


def test_the_state_of_accelerate_survives_training_arguments(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    with compat_transformers.preserve_accelerate_state():
        transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
        with pytest.raises(AttributeError, match="mixed_precision|AcceleratorState"):
            print(accelerator.mixed_precision)  # which is why it is preserved
    assert accelerator.mixed_precision == "bf16"


def test_the_learning_rate_of_the_next_step_is_known(tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), learning_rate=0.5, use_cpu=True, report_to=[])
    trainer = transformers.Trainer(torch.nn.Linear(2, 2), arguments)
    trainer.create_optimizer_and_scheduler(10)
    assert compat_transformers.learning_rate(trainer) == 0.5
