"""InfoNCE against a loop that follows its definition."""

import math

import pytest
import torch

from raybge.model.losses import info_nce


def by_definition(q, p, target, visible, temperature):
    """-log( e^(q.p+ / t) / sum over visible p of e^(q.p / t) ) for one query, in float64."""
    scores = [math.fsum(a * b for a, b in zip(q, other, strict=True)) / temperature for other in p]
    total = math.fsum(math.exp(s) for s, seen in zip(scores, visible, strict=True) if seen)
    return math.log(total) - scores[target]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_equals_the_definition(masked, temperature):
    torch.manual_seed(0)
    q_BD, p_ND = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1), torch.randn(7, 8)
    targets_B = torch.tensor([0, 4, 6])
    mask_BN = torch.rand(3, 7) < 0.6
    mask_BN[torch.arange(3), targets_B] = True
    visible = mask_BN if masked else torch.ones(3, 7, dtype=torch.bool)
    loss_B = info_nce(q_BD, p_ND, targets_B, mask_BN if masked else None, temperature)
    expected = [
        by_definition(q_BD[b].tolist(), p_ND.tolist(), int(targets_B[b]), visible[b].tolist(), temperature)
        for b in range(3)
    ]
    assert loss_B.tolist() == pytest.approx(expected, abs=1e-5)


def test_scores_are_fp32_under_autocast():
    """bf16 has 8 bits: at temperature 0.02 a score of 50 would be off by a quarter."""
    q_BD = torch.nn.functional.normalize(torch.randn(4, 64), dim=-1)
    targets_B = torch.arange(4)
    exact_B = info_nce(q_BD, q_BD, targets_B, None, 0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_B = info_nce(q_BD, q_BD, targets_B, None, 0.02)
    assert loss_B.dtype == torch.float32
    assert torch.equal(loss_B, exact_B)
