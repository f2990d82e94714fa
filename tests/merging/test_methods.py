"""Merge methods on single tensors, compared with reference implementations and values computed by hand."""

import numpy as np
import pytest
import torch

from raybge.merging import methods
from raybge.merging.methods import slerp, ties


def test_slerp_matches_scipy():
    import scipy.spatial as scipy

    torch.manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(50, dtype=torch.float64), dim=0) for _ in range(2))
    for share in (0.0, 0.2, 0.5, 1.0):
        merged = torch.cat([*slerp([a.reshape(5, 10), b.reshape(5, 10)], [1 - share, share])])
        np.testing.assert_allclose(merged, scipy.geometric_slerp(a, b, share), atol=1e-12)
        # another norm does not change the angle
        longer = torch.cat([*slerp([3 * a, 3 * b], [1 - share, share])])
        np.testing.assert_allclose(longer, 3 * merged, atol=1e-12)


@pytest.mark.parametrize("other", [[2.0, -4.0], [-1.0, 2.0], [0.0, 0.0]], ids=["parallel", "opposite", "zero"])
def test_slerp_without_a_unique_arc_is_the_weighted_sum(other):
    (merged,) = slerp([torch.tensor([1.0, -2.0]), torch.tensor(other)], [0.25, 0.75])
    assert torch.allclose(merged, 0.25 * torch.tensor([1.0, -2.0]) + 0.75 * torch.tensor(other))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_with_equal_weights_matches_peft(density, monkeypatch):
    import peft.utils.merge_utils as peft

    monkeypatch.setattr(methods, "BLOCK", 7)
    torch.manual_seed(0)
    base, *tuned = torch.randn(4, 10, 6)
    merged = torch.cat([*ties([*tuned, base], [1 / 3] * 3, density)])
    changes = peft.ties([each - base for each in tuned], torch.ones(3), density)
    assert torch.allclose(merged, (base + changes).reshape(-1), atol=1e-6)


def test_ties_weights_signs_and_changes():
    """Computed by hand: two signs agree, 0.6 outweighs 0.4, and a trimmed change has no influence."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    tuned = [base + torch.tensor(change) for change in ([2.0, 2.0, 2.0, 0.1], [1.0, -2.5, 1.0, -0.2])]
    (merged,) = ties([*tuned, base], [0.6, 0.4], 0.75)
    assert torch.allclose(merged, 1 + torch.tensor([0.6 * 2 + 0.4, 2.0, 0.6 * 2 + 0.4, 0.0]))
