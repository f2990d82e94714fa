"""Models that FSDP keeps in shards: their units, their precision, and calls of their parts outside a step."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from raybge.util.errors import UserError

Result = TypeVar("Result")


def call_sharded(model: nn.Module, action: Callable[[], Result]) -> Result:
    """Run an action that calls parts of a model outside of the model's own forward pass. Collective.

    Of a sharded model, the weights that belong to no layer are gathered throughout, those of a layer during its calls:
    all workers must make equally many.

    Args:
        model: the model, sharded or not.
        action: the calls.

    Returns:
        The action's result.
    """
    if not hasattr(model, "unshard"):
        return action()
    from torch.distributed.fsdp import register_fsdp_forward_method  # takes seconds

    module: Any = model
    module.call = types.MethodType(lambda _: action(), model)
    register_fsdp_forward_method(model, "call")
    try:
        result: Result = module.call()
    finally:
        module.reshard()
        del module.call
    return result


def layer_classes(model: nn.Module) -> set[str]:
    """Return the class names of a model's layers: the members of its lists of modules, except lists within lists."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    return {type(layer).__name__ for name in outermost for layer in model.get_submodule(name).children()}


def prepare_sharding(plugin: Any, config: Mapping[str, Any] | None, backbone: nn.Module) -> None:
    """Shard each layer as a unit of its own, and keep weights, gradients and the loss in fp32.

    With units the memory holds the whole weights of one or two layers at a time. Under --bf16 and --fp16 accelerate
    would have the weights, the gradients' sums over chunks and workers, and the loss in half precision. Here they are
    what they are without FSDP, at twice the bytes between GPUs; the run's autocast converts them.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin, which is changed.
        config: --fsdp_config; a policy that it names stays.
        backbone: the transformer.

    Raises:
        UserError: the backbone has no layer of a class that --fsdp_config names.
    """
    names = {name.removeprefix("fsdp_") for name in config or {}}
    if "mixed_precision_policy" not in names:
        plugin.mixed_precision_policy = None
    classes = layer_classes(backbone)
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted(classes)
    for name in plugin.transformer_cls_names_to_wrap:
        if not any(type(module).__name__ == name for module in backbone.modules()):
            raise UserError(
                f"--fsdp_config transformer_layer_cls_to_wrap: this model has no {name}; its layers are "
                f"{', '.join(sorted(classes)) or 'not in a list'}"
            )
