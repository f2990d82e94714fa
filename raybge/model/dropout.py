"""Dropout and attention with dropout on a CPU, faster than torch's.

torch draws a Bernoulli number for each element, on one core, and its attention with dropout is not fused. Here one
64-bit random number serves four elements, dropped elements are marked by integer operations on their bits, which are
several times as fast as those on bf16 numbers, and attention with dropout works on slices that stay in the cache.
Probabilities are the model's to 1 in 65,536; the random numbers differ from torch's.

Letters in tensor names: B texts, H heads, T tokens, D width of a head, S slices of (text, head).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raybge.compat.torch import softmax_backward

DTYPES = torch.float32, torch.bfloat16
SLICE_NUMBERS = 1 << 19  # attention weights processed at a time: 2 MiB in fp32
_LEVELS = 1 << 16
_BITS = {4: torch.int32, 2: torch.int16}  # integers of the size of a number in bytes


class Dropout(nn.Dropout):
    """Like nn.Dropout, faster on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply dropout in training mode."""
        if not self.training or self.p == 0 or self.p == 1 or input.device.type != "cpu" or input.dtype not in DTYPES:
            return super().forward(input)
        return _CpuDropout.apply(input, self.p)


class _CpuDropout(torch.autograd.Function):
    """Dropout of a tensor in fp32 or bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        """Compute the numbers times 1 / (1 - p), 0 with probability p."""
        signs, ctx.factor = _random_signs(x.shape, p)
        keep = signs.bitwise_right_shift_(15).bitwise_not_().to(_BITS[x.element_size()])
        ctx.save_for_backward(keep)
        return _keep_bits(x * ctx.factor, keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the input."""
        return _keep_bits(grads[0] * ctx.factor, *ctx.saved_tensors), None


class DropoutAttention(torch.autograd.Function):
    """dropout(softmax(q k^T scale + mask)) v; (B, H, T, D) in fp32 or bf16 on a CPU.

    Matrix products are in the type of q, k and v; the softmax and its gradient are computed in fp32, as under autocast,
    and rounded to that type. The mask is bool, True where a query attends to a key, or numbers added to the scores.
    Only one tensor of weights is saved for the backward pass, with a negative sign where a weight was dropped: a
    softmax is never negative, so |x| are the weights before dropout and max(x, 0) those after it, up to the factor
    1 / (1 - p).
    """

    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask: Tensor | None, p: float, scale: float
    ) -> Tensor:
        """Compute (B, H, T, D); the scores of a slice of texts at a time."""
        texts, heads, tokens, _ = q_BHTD.shape
        x_BHTT = q_BHTD.new_empty(texts, heads, tokens, tokens)
        out_BHTD = torch.empty_like(v_BHTD, memory_format=torch.contiguous_format)
        factor = 1.0
        for part, buffer_STT, _ in _slices(x_BHTT):
            x_STT = x_BHTT[part].flatten(0, 1)
            torch.bmm(_flat(q_BHTD, part) * scale, _flat(k_BHTD, part).transpose(1, 2), out=buffer_STT)
            if mask is not None:
                _add_mask(buffer_STT.view_as(x_BHTT[part]), mask[part] if len(mask) > 1 else mask)
            torch.softmax(buffer_STT, dim=-1, out=x_STT)
            signs, factor = _random_signs(x_STT.shape, p)
            _set_signs(x_STT, signs)
            torch.bmm(_positive_part(x_STT, buffer_STT), _flat(v_BHTD, part), out=out_BHTD[part].flatten(0, 1))
        out_BHTD *= factor
        ctx.save_for_backward(q_BHTD, k_BHTD, v_BHTD, x_BHTT, out_BHTD)
        ctx.scale, ctx.factor = scale, factor
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of q, k and v from the saved weights."""
        q_BHTD, k_BHTD, v_BHTD, x_BHTT, out_BHTD = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(out_BHTD) for _ in range(3))
        for part, grad_STT, after_STT in _slices(x_BHTT):
            x_STT, grad_STD = x_BHTT[part].flatten(0, 1), _flat(grads[0], part)
            dot_ST1 = None
            if x_STT.dtype == torch.float32:
                dot_ST1 = (grad_STD * out_BHTD[part].flatten(0, 1)).sum(dim=-1, keepdim=True)
            grad_STD = grad_STD * ctx.factor
            _positive_part(x_STT, after_STT)
            torch.bmm(after_STT.transpose(1, 2), grad_STD, out=grad_v[part].flatten(0, 1))
            torch.bmm(grad_STD, _flat(v_BHTD, part).transpose(1, 2), out=grad_STT)
            grad_STT = _score_gradient(x_STT, grad_STT, after_STT, dot_ST1)
            torch.bmm(grad_STT, _flat(k_BHTD, part) * ctx.scale, out=grad_q[part].flatten(0, 1))
            torch.bmm(grad_STT.transpose(1, 2), _flat(q_BHTD, part) * ctx.scale, out=grad_k[part].flatten(0, 1))
        return grad_q, grad_k, grad_v, None, None, None


def _score_gradient(x_STT: Tensor, grad_STT: Tensor, after_STT: Tensor, dot_ST1: Tensor | None) -> Tensor:
    """Return the gradient of the scores: each weight times the difference of its own gradient from the weighted mean.

    Args:
        x_STT: weights, negative where they were dropped.
        grad_STT: gradient of the weights after dropout; overwritten.
        after_STT: weights after dropout; overwritten.
        dot_ST1: the weighted mean, in fp32; None in bf16, where torch's own kernel computes in fp32 and rounds once.

    Returns:
        (S, T, T).
    """
    if dot_ST1 is not None:
        return grad_STT.mul_(after_STT).addcmul_(torch.abs(x_STT, out=after_STT), dot_ST1, value=-1)
    bits_STT = x_STT.view(torch.int16)
    _keep_bits(grad_STT, torch.bitwise_right_shift(bits_STT, 15).bitwise_not_())
    weight_STT = torch.bitwise_and(bits_STT, 0x7FFF, out=after_STT.view(torch.int16)).view(torch.bfloat16)
    return softmax_backward(grad_STT, weight_STT)


def _random_signs(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """Return int16 numbers, of which only the sign bit is set, each with probability p, or none; and 1 / (1 - p)."""
    # torch's generator seeds numpy's, which is faster: restoring torch's state repeats these numbers too.
    generator = np.random.Generator(np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_())))
    words = generator.integers(0, 1 << 64, (shape.numel() + 3) // 4, dtype=np.uint64)
    dropped = min(max(round(p * _LEVELS), 1), _LEVELS - 1)
    numbers = torch.from_numpy(words.view(np.int16))[: shape.numel()].view(shape)
    numbers.lt_(dropped - _LEVELS // 2).mul_(-_LEVELS // 2)
    return numbers, _LEVELS / (_LEVELS - dropped)


def _set_signs(x: Tensor, signs: Tensor) -> None:
    """Make numbers negative where the int16 sign is, in place; the numbers are not negative."""
    if x.element_size() == 4:
        signs = signs.to(torch.int32).bitwise_left_shift_(16)
    x.view(_BITS[x.element_size()]).bitwise_or_(signs)


def _positive_part(x: Tensor, out: Tensor) -> Tensor:
    """Write max(x, 0) to `out`, of the same type, and return it. A negative number is a negative integer too."""
    bits = _BITS[x.element_size()]
    torch.clamp(x.view(bits), min=0, out=out.view(bits))
    return out


def _keep_bits(x: Tensor, keep: Tensor) -> Tensor:
    """Set numbers to 0 where `keep`, integers of their size, is 0 instead of all bits, in place; return them."""
    x.view(keep.dtype).bitwise_and_(keep)
    return x


def _add_mask(score_BHTT: Tensor, mask: Tensor) -> None:
    """Apply a bool or additive mask to the scores, in place."""
    if mask.dtype == torch.bool:
        # Padding is on the right and a chunk's texts have similar lengths: few columns are hidden from any query.
        hidden_T = ~mask.flatten(0, -2).all(dim=0)
        first = int(hidden_T.int().argmax()) if hidden_T.any() else len(hidden_T)
        score_BHTT[..., first:].masked_fill_(~mask[..., first:], -torch.inf)
    else:
        score_BHTT.add_(mask)


def _slices(x_BHTT: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield slices of texts with about SLICE_NUMBERS attention weights each, and two buffers (S, T, T) for a slice."""
    texts, heads, tokens, _ = x_BHTT.shape
    size = min(texts, max(1, SLICE_NUMBERS // (heads * tokens * tokens)))
    first_STT, second_STT = x_BHTT.new_empty(2, size * heads, tokens, tokens)
    for start in range(0, texts, size):
        slices = min(size, texts - start) * heads
        yield slice(start, start + size), first_STT[:slices], second_STT[:slices]


def _flat(x_BHTD: Tensor, part: slice) -> Tensor:
    """Return a slice of texts as (S, T, D)."""
    return x_BHTD[part].flatten(0, 1)
