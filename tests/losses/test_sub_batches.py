"""Sub-batches: dropout is repeated, and no activations are held."""

import torch
from test_objective import GROUPS, batch_of, gradient_of, model_of

from raybge.model.embedding import SUB_BATCH_MULTIPLE


def test_sub_batches_replay_dropout():
    """Against the same chunks with their graphs held: the gradient is equal only if each dropout mask is repeated."""

    def gradient(recompute: bool, dropout: float) -> torch.Tensor:
        model = model_of("cross-worker", "sub-batched").train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        if not recompute:
            model.sub_batch_size = None
            chunks = model.embedding.embed
            model.embedding.embed = lambda ids, tokens, multiple, *_: torch.cat(  # the same chunks of 3, sorted
                [chunks([ids[i] for i in rows], tokens, SUB_BATCH_MULTIPLE) for rows in by_length(ids, 3)]
            )[position_of(ids, 3)]
        torch.manual_seed(3)
        model(batch_of(0, GROUPS, alone=False)).backward()
        return gradient_of(model)

    reference, again = gradient(False, 0.3), gradient(True, 0.3)
    assert (reference - again).norm() / reference.norm() < 1e-6
    assert (gradient(True, 0.0) - again).norm() / again.norm() > 0.1  # dropout was on


def by_length(ids, size):
    rows = sorted(range(len(ids)), key=lambda row: (-len(ids[row]), row))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def position_of(ids, size):
    rows = [row for chunk in by_length(ids, size) for row in chunk]
    return torch.tensor(rows).argsort()


def test_sub_batches_hold_no_activations():
    """Bytes that autograd holds after the forward pass grow with the batch by the vectors alone."""

    def held(sub_batch_size: int | None, sub_batch_tokens: int | None = None) -> int:
        model = model_of("cross-worker")
        model.sub_batch_size, model.sub_batch_tokens = sub_batch_size, sub_batch_tokens
        held = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(batch_of(0, GROUPS, alone=False))
        return held

    assert held(2) < held(None) / 10
    assert held(None, 40) < held(None) / 10
