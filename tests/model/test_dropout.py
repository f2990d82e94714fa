"""Fast dropout against torch's own arithmetic, with the same elements dropped."""

import pytest
import torch

from raybge.model import dropout as module
from raybge.model.dropout import Dropout, DropoutAttention


def heads(texts: int = 5, tokens: int = 7) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(texts, tokens, 3, 8).transpose(1, 2).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("slice_numbers", [1, 300, 1 << 19])
def test_attention_equals_autograd_with_the_same_dropout(monkeypatch, mask, slice_numbers):
    """The dropped weights are read from a product with the identity; autograd with them gives the same gradient."""
    monkeypatch.setattr(module, "SLICE_NUMBERS", slice_numbers)
    q, k, v = heads()
    sees = torch.ones(5, 1, 1, 7, dtype=torch.bool)
    sees[1, ..., 5:] = False
    attention_mask = {None: None, "bool": sees.expand(5, 1, 7, 7), "float": torch.where(sees, 0.0, -1e9)}[mask]
    scale, p = 8**-0.5, 0.25

    def attend(values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return DropoutAttention.apply(q, k, values, attention_mask, p, scale)

    score = q @ k.transpose(2, 3) * scale
    score = score if mask is None else score.masked_fill(~sees, -torch.inf)
    weight = torch.softmax(score, dim=-1)
    with torch.no_grad():
        eye = torch.eye(7).expand(5, 3, 7, 7).contiguous()
        retained = attend(eye) != 0
    out, expected = attend(v), (weight * retained / (1 - p)) @ v
    share = retained[weight > 0].float().mean().item()
    assert share == pytest.approx(1 - p, abs=0.06)
    assert torch.allclose(out, expected, atol=1e-5)
    direction = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), direction)
    theirs = torch.autograd.grad(expected, (q, k, v), direction)
    for a, b in zip(ours, theirs, strict=True):
        assert b.norm() > 0.1
        assert (a - b).norm() / b.norm() < 1e-5


@pytest.mark.parametrize("slice_numbers", [300, 1 << 19])
def test_attention_in_bf16_drops_the_weights_of_fp32(monkeypatch, slice_numbers):
    """Output and gradients differ by the rounding of bf16, 8 bits, from those in fp32 with the same random numbers."""
    monkeypatch.setattr(module, "SLICE_NUMBERS", slice_numbers)
    q, k, v = heads()
    mask = torch.ones(5, 1, 7, 7, dtype=torch.bool)
    mask[2, ..., 4:] = False
    direction = torch.randn(5, 3, 7, 8)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(1)
        out = DropoutAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype), mask, 0.25, 8**-0.5)
        assert out.dtype == dtype
        return [out.float(), *torch.autograd.grad(out, (q, k, v), direction.to(dtype))]

    for half, exact in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        assert 1e-4 < (half - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("p", [0.1, 0.5, 1e-4])
def test_drop_rate_and_mean(p):
    """Four standard deviations of a binomial."""
    torch.manual_seed(0)
    count = 400_000
    out = Dropout(p)(torch.ones(count))
    dropped = (out == 0).float().mean().item()
    assert abs(dropped - p) < 4 * (p * (1 - p) / count) ** 0.5 + 1 / 65_536
    assert out.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    neighbors = ((out[1:] == 0) & (out[:-1] == 0)).float().mean().item()
    assert neighbors == pytest.approx(p * p, abs=4 * (p * p / count) ** 0.5 + 1e-5)


def test_gradient_reaches_the_retained_elements():
    x = torch.randn(100, requires_grad=True)
    out = Dropout(0.3)(x)
    out.sum().backward()
    assert torch.equal(x.grad != 0, out != 0)
    assert torch.allclose(x.grad * x.detach(), out.detach())


def test_seed_determines_the_dropped_elements():
    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return Dropout(0.5)(torch.ones(1000))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
