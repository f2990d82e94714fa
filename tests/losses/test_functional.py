"""Losses against loops that follow their definitions."""

import math

import pytest
import torch

from raybge.losses.functional import info_nce, kl_divergence, m3_distillation, softmax_terms


def by_definition(q, p, target, visible, temperature):
    """-log( e^(q.p+ / t) / sum over visible p of e^(q.p / t) ) for one query, in float64."""
    scores = [math.fsum(a * b for a, b in zip(q, other, strict=True)) / temperature for other in p]
    total = math.fsum(math.exp(s) for s, seen in zip(scores, visible, strict=True) if seen)
    return math.log(total) - scores[target]


@pytest.mark.parametrize("block", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_info_nce_equals_its_definition(masked, temperature, block):
    torch.manual_seed(0)
    q_BD, p_ND = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1), torch.randn(7, 8)
    target_B = torch.tensor([0, 4, 6])
    mask_BN = torch.rand(3, 7) < 0.6
    mask_BN[torch.arange(3), target_B] = True
    visible = mask_BN if masked else torch.ones(3, 7, dtype=torch.bool)
    mask = (lambda start, stop: mask_BN[:, start:stop]) if masked else None
    loss_B = info_nce(q_BD, p_ND, target_B, mask, temperature, block)
    expected = [
        by_definition(q_BD[b].tolist(), p_ND.tolist(), int(target_B[b]), visible[b].tolist(), temperature)
        for b in range(3)
    ]
    assert loss_B.tolist() == pytest.approx(expected, abs=1e-5)


def test_scores_are_fp32_under_autocast():
    """bf16 has 8 bits: at temperature 0.02 a score of 50 would be off by a quarter."""
    q_BD = torch.nn.functional.normalize(torch.randn(4, 64), dim=-1)
    target_B = torch.arange(4)
    exact_B = info_nce(q_BD, q_BD, target_B, None, 0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_B = info_nce(q_BD, q_BD, target_B, None, 0.02)
    assert loss_B.dtype == torch.float32
    assert torch.equal(loss_B, exact_B)


def test_small_loss_is_precise():
    """log(1 + e^-12) is 6e-6: as the difference of two numbers near 50, 4e-6 apart in fp32, it would be off by half."""
    q_BD = torch.tensor([[1.0, 0.0]])
    p_ND = torch.tensor([[1.0, 0.0], [1 - 12 / 50, 0.0]])
    loss = info_nce(q_BD, p_ND, torch.tensor([0]), None, 0.02)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-12)), rel=0.02)


@pytest.mark.parametrize("block", [None, 2])
def test_gradient_of_softmax_terms_equals_autograd(block):
    """Denominator and picks, with masked scores, masked picks and missing picks."""
    torch.manual_seed(0)
    q, p = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    picks = torch.tensor([[0, 3, -1], [8, 8, 2], [4, -1, -1], [1, 0, 5]])
    seen = torch.rand(4, 9) < 0.6
    seen[1, 8] = False
    weights = torch.randn(4), torch.randn(4, 3)

    def weighted(denominator, at):
        return (denominator * weights[0]).sum() + (at.masked_fill(picks < 0, 0.0) * weights[1]).sum()

    ours = torch.autograd.grad(weighted(*softmax_terms(q, p, picks, lambda a, b: seen[:, a:b], 0.5, block)), (q, p))
    full = q @ p.T / 0.5
    at = full.gather(1, picks.clamp(min=0))
    expected = torch.autograd.grad(weighted(full.masked_fill(~seen, -torch.inf).logsumexp(1) - at[:, 0], at), (q, p))
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_fully_masked_query_has_no_denominator_and_no_gradient_from_it():
    q, p = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4)
    seen = torch.tensor([[True, True, False], [False, False, False]])
    denominator, at = softmax_terms(q, p, torch.tensor([[0], [1]]), lambda a, b: seen[:, a:b], 1.0)
    assert denominator[1] == -torch.inf
    (torch.where(denominator.isinf(), 0.0, denominator).sum() + at.sum()).backward()
    assert torch.allclose(q.grad[1], p[1])


def test_distillation_ignores_padding_of_short_groups():
    torch.manual_seed(0)
    rest, at, teacher = torch.randn(2), torch.randn(2, 3), torch.randn(2, 3)
    none = torch.full((2, 2), -torch.inf)
    wide_at, wide_teacher = torch.cat([at, none], 1), torch.cat([teacher, none], 1)
    assert torch.allclose(kl_divergence(at, teacher), kl_divergence(wide_at, wide_teacher))
    assert torch.allclose(m3_distillation(rest, at, teacher), m3_distillation(rest, wide_at, wide_teacher))
