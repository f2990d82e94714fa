"""Check on a GPU that a model has the same vectors, and in training gradients, on packed texts as on padded ones.

Models differ in positions, masks and buffers, and kernels in what they support: no list of names would hold.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from raybge.model.attention import has_packed_kernels, use_fast_attention
from raybge.model.embedding import EmbeddingModel, max_positions
from raybge.model.precision import full_precision
from raybge.util.errors import first_line

LONGEST = 512  # tokens of the longest text of the check
# Largest relative difference between packed and padded texts, of a vector and of the gradient, which both are sums of
# rounding errors. Wrong positions or masks give differences of the order of 1.
FP32_TOLERANCE = 5e-3, 1e-2
HALF_TOLERANCE = 5e-2, 0.2
COMPARED_PARAMETERS, COMPARED_NUMBERS = 24, 1 << 25  # parameters whose gradient is compared, and the size of each
CHECKED_SUB_BATCH = 3  # most texts of a chunk in the check of a run with sub-batches
LOSS_SCALE = 1024.0  # small gradients are not representable in fp16


def prepare_for_training(
    model: EmbeddingModel, precision: torch.dtype | None = None, sub_batch_size: int | None = None
) -> str | None:
    """Switch a model to the fast attention, and to packed texts on a GPU unless the check fails.

    Args:
        model: the model on its device, with activation checkpointing and adapters as in the run.
        precision: autocast of the run, None for fp32.
        sub_batch_size: of the run.

    Returns:
        Why texts are padded on a GPU; None if they are packed, and on a CPU, where padded chunks are as fast.

    Raises:
        torch.OutOfMemoryError: the texts of the check do not fit into memory.
    """
    use_fast_attention(model.backbone)
    if not has_packed_kernels(_device(model)):
        return None
    failure = packing_failure(model, precision, sub_batch_size)
    model.packs = failure is None
    return failure


def prepare_for_inference(model: EmbeddingModel, precision: torch.dtype | None = None) -> str | None:
    """Switch a model that is not trained to packed texts on a GPU, unless its vectors fail the check.

    Args:
        model: the model on its device, in the precision of its weights.
        precision: autocast of the run, None for the precision of the weights.

    Returns:
        Why texts are padded on a GPU; None if they are packed, and on a CPU.

    Raises:
        torch.OutOfMemoryError: the texts of the check do not fit into memory.
    """
    if not has_packed_kernels(_device(model)):
        return None
    use_fast_attention(model.backbone)
    failure = _failure(model, partial(_vector_difference, model, precision))
    model.packs = failure is None
    return failure


def packing_failure(model: EmbeddingModel, precision: torch.dtype | None, sub_batch_size: int | None) -> str | None:
    """Return how packed texts fail with a model, None if they do not.

    1. Without autocast and dropout, vectors equal those of padded texts: positions and masks are right.
    2. In the run's precision, vectors and gradients do: the kernel is right.
    3. A step in the run's precision with dropout and checkpointing has a finite gradient.

    No random number of the caller is drawn, and no gradient is left behind.

    Args:
        model: the model, see `prepare_for_training`.
        precision: autocast of the run, None for fp32.
        sub_batch_size: of the run.

    Returns:
        The reason in one line, or None.

    Raises:
        torch.OutOfMemoryError: the texts of the check do not fit into memory.
    """
    # Two sub-batches at least: a second one meets what the first has left.
    sub_batch_size = None if sub_batch_size is None else min(sub_batch_size, CHECKED_SUB_BATCH)

    def check() -> str | None:
        with full_precision(_device(model)):
            failure = _difference(model, None, sub_batch_size, FP32_TOLERANCE)
        if failure is None and precision is not None:
            failure = _difference(model, precision, sub_batch_size, HALF_TOLERANCE)
        if failure is not None:
            return failure
        model.train()
        _, gradients = _step(model, True, precision, sub_batch_size)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            return "the gradient of packed texts is not finite"
        return None

    return _failure(model, check)


def _failure(model: EmbeddingModel, check: Callable[[], str | None]) -> str | None:
    """Return the reason that a check returns, or the error that it raises in one line; None if it passes."""
    try:
        with _unchanged(model):
            return check()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # says nothing about packing; after an AcceleratorError the device is of no use
    except Exception as error:  # models and kernels raise any error for what they do not support
        if "ALLOC_FAILED" in str(error):
            raise
        return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def _unchanged(model: EmbeddingModel) -> Iterator[None]:
    """Evaluate the model in the block, and restore its state and the random state afterwards."""
    training = {module: module.training for module in model.modules()}
    packs, device = model.packs, _device(model)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.eval()
            yield
    finally:
        model.packs = packs
        for module, mode in training.items():
            module.training = mode


def _difference(
    model: EmbeddingModel, precision: torch.dtype | None, sub_batch_size: int | None, tolerance: tuple[float, float]
) -> str | None:
    """Return how vectors or gradients of packed texts differ from those of padded ones; None if they do not."""
    (padded_ND, padded_grads), (packed_ND, packed_grads) = (
        _step(model, packs, precision, sub_batch_size) for packs in (False, True)
    )
    kind = _name(precision)
    if not bool(padded_ND.isfinite().all()):
        return f"the vectors of padded texts are not finite in {kind}"
    differences = {
        "vectors": _largest_difference(packed_ND, padded_ND),
        "gradients": _norm([a - b for a, b in zip(packed_grads, padded_grads, strict=True)]) / _norm(padded_grads),
    }
    for (name, difference), limit in zip(differences.items(), tolerance, strict=True):
        if not difference <= limit:  # or not a number
            return f"the {name} of packed texts differ by {float(difference):.1%} in {kind}"
    return None


@torch.no_grad()
def _vector_difference(model: EmbeddingModel, precision: torch.dtype | None) -> str | None:
    """Return how vectors of packed texts differ from those of padded ones in a run's precision, or None."""
    texts, device = _texts(model), _device(model)
    vectors = []
    for model.packs in (False, True):
        with torch.autocast(device.type, precision, enabled=precision is not None):
            vectors.append(model.embed_chunk(texts))
    padded_ND, packed_ND = vectors
    dtype = precision or next(model.parameters()).dtype
    if not bool(padded_ND.isfinite().all()):
        return f"the vectors of padded texts are not finite in {_name(dtype)}"
    limit, _ = FP32_TOLERANCE if dtype == torch.float32 else HALF_TOLERANCE
    difference = _largest_difference(packed_ND, padded_ND)
    if not difference <= limit:  # or not a number
        return f"the vectors of packed texts differ by {float(difference):.1%} in {_name(dtype)}"
    return None


def _largest_difference(one_ND: Tensor, other_ND: Tensor) -> Tensor:
    """Return the largest relative difference of a vector."""
    return ((one_ND - other_ND).norm(dim=-1) / other_ND.norm(dim=-1)).max()


def _name(precision: torch.dtype | None) -> str:
    return str(precision or torch.float32).removeprefix("torch.")


def _texts(model: EmbeddingModel) -> list[np.ndarray]:
    """Return the texts of the check: random tokens, as many as fit, one, and some in between."""
    room, vocabulary = min(max_positions(model.backbone) or LONGEST, LONGEST), int(model.backbone.config.vocab_size)
    random = np.random.default_rng(0)
    return [random.integers(vocabulary // 2, vocabulary, n) for n in (room, max(1, room - 1), 3, room // 2 + 1, 1)]


def _step(
    model: EmbeddingModel, packs: bool, precision: torch.dtype | None, sub_batch_size: int | None
) -> tuple[Tensor, list[Tensor]]:
    """Return e_ND of the texts of the check, and the gradient of a loss for the first trained parameters.

    They are gradients through all layers, and need little memory: the check comes before weights are sharded.
    """
    texts, random = _texts(model), np.random.default_rng(1)
    model.packs = packs
    device = _device(model)
    with torch.autocast(device.type, precision, enabled=precision is not None):
        e_ND = model.embed(texts, sum(map(len, texts)), None, sub_batch_size)
    direction_ND = torch.from_numpy(random.standard_normal(e_ND.shape, dtype=np.float32)).to(device)
    small = (p for p in model.parameters() if p.requires_grad and p.numel() <= COMPARED_NUMBERS)
    trained = list(itertools.islice(small, COMPARED_PARAMETERS))
    loss = LOSS_SCALE * (e_ND * direction_ND).sum()
    return e_ND.detach(), [grad.float() for grad in torch.autograd.grad(loss, trained, materialize_grads=True)]


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def _device(model: EmbeddingModel) -> torch.device:
    return next(model.parameters()).device
