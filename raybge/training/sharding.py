"""Models that FSDP keeps in shards: access to their weights, and their precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather all weights of a sharded model for the duration of the block. Collective."""
    sharded: list[Any] = [m for m in model.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def keep_weights_in_fp32(plugin: Any, config: Mapping[str, Any] | None) -> None:
    """Have FSDP gather weights and sum gradients in fp32 with --bf16 and --fp16; the run's autocast converts them.

    accelerate would have the weights, the gradients' sums over chunks and workers, and the loss in half precision. Here
    they are what they are without FSDP, at twice the bytes between GPUs. A policy in --fsdp_config stays.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin.
        config: --fsdp_config.
    """
    if not any(name.removeprefix("fsdp_") == "mixed_precision_policy" for name in config or {}):
        plugin.mixed_precision_policy = None
