"""Precision: of a model that is not trained, of scores, and of the gradients of chunks under autocast."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator

import torch

_BF16_INSTRUCTIONS = "avx512_bf16", "bf16"  # of x86 and Arm: with some the gain is none
_GAIN = 0.8  # largest time of bf16 as a share of that of fp32


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute matrix products of fp32 tensors in fp32 during the block, also under autocast and with --tf32.

    Args:
        device: device of the tensors.
    """
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    # A value that was inherited must be inherited again, and not become the backend's own.
    general = torch.backends.fp32_precision
    before = ["none" if backend.fp32_precision == general else backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def autocast_without_cache(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return the autocast that is active, without its cache; nothing if none is active.

    The cache gives all chunks of a batch one half-precision copy of each weight, whose gradient is then the sum over
    the chunks in half precision: it loses what a chunk adds to a sum that is 256 times larger. Without the cache each
    chunk's gradient is added in fp32.

    Args:
        device: device of the model.

    Returns:
        A context manager.
    """
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the precision of the autocast that is active, None if none is."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def bf16_message(device: torch.device) -> str | None:
    """Return what to use in place of bf16 on a GPU that computes it by emulation; None on others and on a CPU."""
    if device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"--bf16 is slow on {torch.cuda.get_device_name(device)}: compute capability 8.0 or more has it in hardware, "
        f"this GPU has {major}.{minor}; --fp16 True is faster"
    )


def cpu_has_bf16_units() -> bool:
    """Return True if this CPU has AMX, units that multiply matrices in bf16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@functools.cache
def cpu_gains_by_bf16() -> bool:
    """Return True if this CPU multiplies matrices faster in bf16 than in fp32: it has AMX, or a measurement says so.

    For inference: a measurement may turn out otherwise in another worker or after a restart.
    """
    capabilities = torch.cpu.get_capabilities()
    if cpu_has_bf16_units():
        return True
    if not any(capabilities.get(name) for name in _BF16_INSTRUCTIONS):
        return False
    seconds = {dtype: _seconds_of_a_product(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return seconds[torch.bfloat16] < _GAIN * seconds[torch.float32]


def _seconds_of_a_product(dtype: torch.dtype) -> float:
    """Return the shortest of several times of a product of the size of a layer's."""
    x_TD, weight_DD = torch.ones(2048, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(x_TD, weight_DD)
        times.append(time.perf_counter() - start)
    return min(times)


def cpu_bf16_message(flag: str) -> str:
    """Return the line that states what a flag for training in bf16 does on this CPU."""
    if cpu_has_bf16_units():
        return f"{flag}: this CPU has units for bf16 (AMX)"
    return f"{flag} is off: this CPU has no units for bf16 (AMX)"


def inference_dtype(on_cpu: bool, use_fp16: bool | None, use_bf16: bool | None) -> torch.dtype:
    """Return the type of a model's weights where it is not trained: half precision on a GPU unless it is switched off.

    Args:
        on_cpu: it runs on a CPU: fp32, unless bf16 is selected and the CPU gains by it.
        use_fp16: False switches fp16 off.
        use_bf16: True selects bf16, whose range is that of fp32, in place of fp16.

    Returns:
        The type.
    """
    if on_cpu:
        return torch.bfloat16 if use_bf16 and cpu_gains_by_bf16() else torch.float32
    if use_fp16 is False and not use_bf16:
        return torch.float32
    return torch.bfloat16 if use_bf16 else torch.float16
