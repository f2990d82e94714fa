"""torch's attention kernels for packed texts on a CPU, so that what runs on a GPU can be tested without one.

The operators of a GPU get implementations for CPU tensors: loops over texts that follow the definition of attention,
with dropout masks drawn from a seed that the forward pass takes from torch's random state. Everything around them is
torch's own: dispatch, derivatives, checkpointing, autocast.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def packed_kernels(calls: list[str] | None = None) -> Iterator[None]:
    """Have models pack texts on a CPU, as on a GPU; `calls` receives the name of a kernel for each forward pass."""

    def recorded(name: str, forward: Callable) -> Callable:
        def call(*args, **kwargs):
            if calls is not None:
                calls.append(name)
            return forward(*args, **kwargs)

        return call

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", recorded("flash", _flash_forward), "CPU")
        library.impl("_flash_attention_backward", _flash_backward, "CPU")
        library.impl("_efficient_attention_forward", recorded("efficient", _efficient_forward), "CPU")
        library.impl("_efficient_attention_backward", _efficient_backward, "CPU")
        with (
            mock.patch("raybge.model.attention.has_packed_kernels", lambda device: True),
            mock.patch("raybge.model.packing.has_packed_kernels", lambda device: True),
        ):
            yield


def _flash_forward(q, k, v, bounds, _, longest, *rest, scale=None, **options):
    dropout, causal, _ = rest[1:]
    assert bounds.dtype == torch.int32 and not any(value is not None for value in options.values())
    assert longest == rest[0] == int(bounds.diff().max())
    if {q.dtype, k.dtype, v.dtype} not in ({torch.float16}, {torch.bfloat16}):
        raise RuntimeError("FlashAttention only supports fp16 and bf16 data type")
    seed = torch.randint(2**31, ()).to(torch.uint64)
    out = _forward(q, k, v, bounds, dropout, causal, scale, int(seed))
    return out, out.new_zeros(q.shape[1], len(q), dtype=torch.float32), seed, seed, out.new_empty(0)


def _flash_backward(grad, q, k, v, out, lse, bounds, _, __, ___, dropout, causal, seed, ____, *, scale=None, **options):
    return _backward(grad, q, k, v, bounds, dropout, causal, scale, int(seed))


def _efficient_forward(q, k, v, bias, bounds, _, longest, __, dropout, mask, needs_lse=False, *, scale=None, **options):
    assert bias is None and needs_lse and mask in (0, 1) and not any(value is not None for value in options.values())
    assert q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    seed = torch.randint(2**31, ())
    out = _forward(q[0], k[0], v[0], bounds, dropout, bool(mask), scale, int(seed))[None]
    return out, out.new_zeros(1, q.shape[2], q.shape[1]), seed, seed, longest, longest


def _efficient_backward(
    grad, q, k, v, _, out, bounds, __, ___, ____, lse, dropout, seed, _____, mask, *rest, **options
):
    scale = options.get("scale")
    grads = _backward(grad[0], q[0], k[0], v[0], bounds, dropout, bool(mask), scale, int(seed))
    return *(each[None] for each in grads), torch.empty(0)


def _forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, dropout, causal, scale, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for q_HTD, k_HTD, v_HTD in _texts(bounds, q, k, v):
        weight_HTT, keep_HTT = _weights(q_HTD, k_HTD, dropout, causal, scale, generator)
        out.append((weight_HTT * keep_HTT) @ v_HTD)
    return torch.cat(out, dim=1).transpose(0, 1).to(q.dtype)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, dropout, causal, scale, seed: int):
    generator = torch.Generator().manual_seed(seed)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    grads: list[list[Tensor]] = [[], [], []]
    for grad_HTD, q_HTD, k_HTD, v_HTD in _texts(bounds, grad, q, k, v):
        weight_HTT, keep_HTT = _weights(q_HTD, k_HTD, dropout, causal, scale, generator)
        grad_weight_HTT = grad_HTD @ v_HTD.mT * keep_HTT
        grad_score_HTT = weight_HTT * (grad_weight_HTT - (grad_weight_HTT * weight_HTT).sum(-1, keepdim=True))
        grads[0].append(grad_score_HTT @ k_HTD * factor)
        grads[1].append(grad_score_HTT.mT @ q_HTD * factor)
        grads[2].append((weight_HTT * keep_HTT).mT @ grad_HTD)
    results = []
    for parts, tensor in zip(grads, (q, k, v), strict=True):
        grad_THD = torch.cat(parts, dim=1).transpose(0, 1)
        heads = tensor.shape[1]
        results.append(grad_THD.unflatten(1, (heads, -1)).sum(2).to(tensor.dtype))  # of repeated heads
    return tuple(results)


def _texts(bounds: Tensor, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield (H, T, D) of each text in fp32, with as many heads as the first tensor."""
    lengths = bounds.diff().tolist()
    heads = tensors[0].shape[1]
    parts = [x.float().repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1) for x in tensors]
    yield from map(list, zip(*(part.split(lengths, dim=1) for part in parts), strict=True))


def _weights(q_HTD: Tensor, k_HTD: Tensor, dropout, causal, scale, generator) -> tuple[Tensor, Tensor]:
    score_HTT = q_HTD @ k_HTD.mT * (q_HTD.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        score_HTT = score_HTT.masked_fill(torch.ones_like(score_HTT[0]).triu(1).bool(), -torch.inf)
    keep_HTT = (torch.rand(score_HTT.shape, generator=generator) >= dropout) / (1 - dropout)
    return score_HTT.softmax(-1), keep_HTT
