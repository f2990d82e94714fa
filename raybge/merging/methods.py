"""Merge methods: arithmetic on one tensor of all models at a time, block by block, in fp32 or wider.

- `linear`: the weighted sum of LM-Cocktail, https://arxiv.org/abs/2311.13534
- `slerp`: spherical linear interpolation, Shoemake 1985, https://doi.org/10.1145/325165.325242
- `ties`: TIES-Merging, https://arxiv.org/abs/2306.01708

Shape suffixes: N elements of a tensor, n elements of one block of it, M models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 1 << 22  # elements of a tensor that are processed at a time

# From one tensor of all models to the merged elements, flat, block by block.
Method = Callable[[Sequence[Tensor]], Iterator[Tensor]]


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Iterator[Tensor]:
    """Yield blocks of the weighted sum.

    Models of weight 0 are skipped, so that the weights 1 and 0 reproduce a tensor bit for bit, and an infinite value of
    a skipped model does not become NaN.
    """
    used = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight]
    for blocks in _blocks([tensor for tensor, _ in used]):
        total_n = blocks[0] * used[0][1]
        for block_n, (_, weight) in zip(blocks[1:], used[1:], strict=True):
            total_n.add_(block_n, alpha=weight)
        yield total_n


def slerp(tensors: Sequence[Tensor], weights: Sequence[float]) -> Iterator[Tensor]:
    """Yield blocks of the interpolation of two tensors along the arc between their directions.

    The weighted sum is used where no unique arc exists: for parallel, opposite and zero tensors.
    """
    products = [[torch.dot(a, b) for a, b in ((x, y), (x, x), (y, y))] for x, y in _blocks(tensors, torch.float64)]
    dot, first, second = torch.tensor(products, dtype=torch.float64).reshape(-1, 3).sum(dim=0).tolist()
    length = math.sqrt(first * second)
    angle = math.acos(max(-1.0, min(1.0, dot / length))) if length else 0.0
    if math.sin(angle) > 1e-6:
        weights = [math.sin(weight * angle) / math.sin(angle) for weight in weights]
    return linear(tensors, weights)


def ties(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Iterator[Tensor]:
    """Yield blocks of a base tensor plus the trimmed, sign-elected and averaged changes of the other tensors.

    Args:
        tensors: M fine-tuned tensors, then their base tensor, all of one shape.
        weights: one for each of the M tensors. They weigh the election of each element's sign, and the average of the
            changes that have the elected sign.
        density: share of each tensor's changes, the largest by magnitude, that is not trimmed to 0.

    Yields:
        Flat blocks of the merged tensor.
    """
    *tuned, base = tensors
    threshold_M1 = torch.tensor([[_trim_threshold(tensor, base, density)] for tensor in tuned])
    weight_M1 = torch.tensor(weights)[:, None]
    for *blocks, base_n in _blocks(tensors):
        change_Mn = torch.stack([block_n - base_n for block_n in blocks])
        change_Mn *= change_Mn.abs() >= threshold_M1
        weighted_Mn = change_Mn * weight_M1
        agrees_Mn = (change_Mn.sign() == weighted_Mn.sum(dim=0).sign()) & (change_Mn != 0)
        total_n, weight_n = (weighted_Mn * agrees_Mn).sum(dim=0), (weight_M1 * agrees_Mn).sum(dim=0)
        yield base_n + torch.where(weight_n > 0, total_n / weight_n, 0.0)


def _trim_threshold(tensor: Tensor, base: Tensor, density: float) -> float:
    """Return the smallest magnitude among the share `density` of largest changes."""
    count = tensor.numel()
    if not count:
        return 0.0
    change_N = torch.empty(count)
    start = 0
    for block_n, base_n in _blocks([tensor, base]):
        change_N[start : start + len(block_n)] = (block_n - base_n).abs()
        start += len(block_n)
    rank = count - max(1, int(density * count))
    values_N = change_N.numpy()
    values_N.partition(rank)  # in place: torch.kthvalue would allocate two more tensors
    return float(values_N[rank])


def _blocks(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Iterator[list[Tensor]]:
    """Yield aligned flat blocks of all tensors, BLOCK elements at a time, in fp32 or wider.

    The blocks may be pages of memory-mapped files: they must not be written into.
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, len(flat[0]), BLOCK):
        parts = [tensor[start : start + BLOCK] for tensor in flat]
        yield [part.to(dtype or torch.promote_types(part.dtype, torch.float32)) for part in parts]
