"""Dropout and attention with dropout on a CPU, faster than torch's.

torch draws a Bernoulli number for each element, on one core, and its attention with dropout is not fused. Here one
64-bit random number serves four elements, and attention with dropout works on slices that stay in the cache.
Probabilities are the model's to 1 in 65,536; the random numbers differ from torch's.

Letters in tensor names: B texts, H heads, T tokens, D width of a head, S slices of (text, head).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SLICE_NUMBERS = 1 << 19  # attention weights processed at a time: 2 MiB
_LEVELS = 1 << 16


class Dropout(nn.Dropout):
    """Like nn.Dropout, faster on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply dropout in training mode."""
        if not self.training or self.p == 0 or self.p == 1 or input.device.type != "cpu":
            return super().forward(input)
        numbers = torch.empty(input.shape)
        scale = _fill_random_signs(numbers, self.p)
        return input * numbers.ge_(0).mul_(scale).to(input.dtype)


def _fill_random_signs(numbers: Tensor, p: float) -> float:
    """Fill an fp32 tensor with random numbers, negative with probability p and never 0; return 1 / (1 - p)."""
    # torch's generator seeds numpy's, which is faster: restoring torch's state repeats these numbers too.
    generator = np.random.Generator(np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_())))
    words = generator.integers(0, 1 << 64, (numbers.numel() + 3) // 4, dtype=np.uint64)
    dropped = min(max(round(p * _LEVELS), 1), _LEVELS - 1)
    numbers.copy_(torch.from_numpy(words.view(np.int16))[: numbers.numel()].view(numbers.shape))
    numbers.add_(_LEVELS // 2 - dropped + 0.5)
    return _LEVELS / (_LEVELS - dropped)


class DropoutAttention(torch.autograd.Function):
    """dropout(softmax(q k^T scale + mask)) v; (B, H, T, D) in fp32 or bf16 on a CPU.

    Matrix products are in the type of q, k and v; the softmax and its gradient are in fp32, as under autocast. The mask
    is bool, True where a query attends to a key, or numbers added to the scores.
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
        for part, weight_STT, number_STT, after_STT in _slices(x_BHTT):
            x_STT = x_BHTT[part].flatten(0, 1)
            torch.bmm(_flat(q_BHTD, part) * scale, _flat(k_BHTD, part).transpose(1, 2), out=x_STT)
            if mask is not None:
                _add_mask(x_BHTT[part], mask[part] if len(mask) > 1 else mask)
            torch.softmax(x_STT, dim=-1, dtype=torch.float32, out=weight_STT)
            factor = _fill_random_signs(number_STT, p)
            torch.copysign(weight_STT, number_STT, out=x_STT)
            torch.clamp(x_STT, min=0, out=after_STT)
            torch.bmm(after_STT, _flat(v_BHTD, part), out=out_BHTD[part].flatten(0, 1))
        out_BHTD *= factor
        ctx.save_for_backward(q_BHTD, k_BHTD, v_BHTD, x_BHTT, out_BHTD)
        ctx.scale, ctx.factor = scale, factor
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of q, k and v from the saved weights."""
        q_BHTD, k_BHTD, v_BHTD, x_BHTT, out_BHTD = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(out_BHTD) for _ in range(3))
        for part, grad_STT, weight_STT, half_STT in _slices(x_BHTT):
            x_STT, grad_STD = x_BHTT[part].flatten(0, 1), _flat(grads[0], part)
            dot_ST1 = (grad_STD * out_BHTD[part].flatten(0, 1)).sum(dim=-1, keepdim=True, dtype=torch.float32)
            grad_STD = grad_STD * ctx.factor
            after_STT = torch.clamp(x_STT, min=0, out=half_STT)
            torch.bmm(after_STT.transpose(1, 2), grad_STD, out=grad_v[part].flatten(0, 1))
            # Gradient of a softmax: each weight times the difference of its own gradient from the weighted mean.
            if half_STT is weight_STT:
                torch.bmm(grad_STD, _flat(v_BHTD, part).transpose(1, 2), out=grad_STT)
                grad_STT.mul_(after_STT)
            else:
                torch.mul(torch.bmm(grad_STD, _flat(v_BHTD, part).transpose(1, 2)), after_STT, out=grad_STT)
            grad_STT.addcmul_(weight_STT.copy_(x_STT).abs_(), dot_ST1, value=-1)
            grad_STT = grad_STT if half_STT is weight_STT else half_STT.copy_(grad_STT)
            torch.bmm(grad_STT, _flat(k_BHTD, part) * ctx.scale, out=grad_q[part].flatten(0, 1))
            torch.bmm(grad_STT.transpose(1, 2), _flat(q_BHTD, part) * ctx.scale, out=grad_k[part].flatten(0, 1))
        return grad_q, grad_k, grad_v, None, None, None


def _add_mask(score_BHTT: Tensor, mask: Tensor) -> None:
    """Apply a bool or additive mask to the scores, in place."""
    if mask.dtype == torch.bool:
        # Padding is on the right and a chunk's texts have similar lengths: few columns are hidden from any query.
        hidden_T = ~mask.flatten(0, -2).all(dim=0)
        first = int(hidden_T.int().argmax()) if hidden_T.any() else len(hidden_T)
        score_BHTT[..., first:].masked_fill_(~mask[..., first:], -torch.inf)
    else:
        score_BHTT.add_(mask)


def _slices(x_BHTT: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield slices of texts with about SLICE_NUMBERS attention weights each, and buffers (S, T, T) for a slice.

    Two are in fp32, the third in the type of the weights: the second one again if that is fp32.
    """
    texts, heads, tokens, _ = x_BHTT.shape
    size = min(texts, max(1, SLICE_NUMBERS // (heads * tokens * tokens)))
    first_STT, second_STT = x_BHTT.new_empty(2, size * heads, tokens, tokens, dtype=torch.float32)
    own_STT = second_STT if x_BHTT.dtype == torch.float32 else torch.empty_like(second_STT, dtype=x_BHTT.dtype)
    for start in range(0, texts, size):
        slices = min(size, texts - start) * heads
        second = second_STT[:slices]
        own = second if own_STT is second_STT else own_STT[:slices]
        yield slice(start, start + size), first_STT[:slices], second, own


def _flat(x_BHTD: Tensor, part: slice) -> Tensor:
    """Return a slice of texts as (S, T, D)."""
    return x_BHTD[part].flatten(0, 1)
