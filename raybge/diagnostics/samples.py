"""Small models and batches for the checks, made without files and without a hub.

Letters in tensor names: B queries, N passages, D width of a vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from raybge.data.step_batch import Groups, StepBatch
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.losses.objective import Objective
from raybge.model.attention import use_fast_attention
from raybge.model.embedding import EmbeddingModel

FAMILIES = ("bert", "roberta", "distilbert", "mpnet", "modernbert", "qwen3", "llama")
DECODERS = ("qwen3", "llama")
TEMPERATURE = 0.05
GROUPS = 12
PASSAGES = 3  # of each group
_VOCABULARY, _WIDTH, _LAYERS, _HEADS, _LONGEST = 1000, 128, 2, 2, 128


def build_embedding(family: str, device: torch.device, dropout: float = 0.0) -> EmbeddingModel:
    """Build a random model of two layers with heads of 64 numbers.

    Args:
        family: one of FAMILIES.
        device: device of the model.
        dropout: dropout probability.

    Returns:
        The model in training mode, with raybge's attention.
    """
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": _VOCABULARY, "max_position_embeddings": _LONGEST + 2}
    size["initializer_range"] = 0.1
    if family == "distilbert":
        size |= {"dim": _WIDTH, "n_layers": _LAYERS, "n_heads": _HEADS, "hidden_dim": 2 * _WIDTH}
        size |= {"dropout": dropout, "attention_dropout": dropout}
    else:
        size |= {"hidden_size": _WIDTH, "num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS}
        size |= {"intermediate_size": 2 * _WIDTH, "pad_token_id": 1, "attention_dropout": dropout}
        size |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        size |= {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    if family in DECODERS:
        size |= {"num_key_value_heads": 1, "head_dim": _WIDTH // _HEADS}
    backbone = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family, **size))
    model = EmbeddingModel(backbone, "last_token" if family in DECODERS else "mean").to(device)
    use_fast_attention(backbone)
    return model.train()


def build_model(device: torch.device, sub_batch_size: int | None = None, dropout: float = 0.0) -> ContrastiveModel:
    """Build a BERT with its objective; see `build_embedding`."""
    return ContrastiveModel(build_embedding("bert", device, dropout), Objective(TEMPERATURE), None, sub_batch_size)


def build_batch(first: int = 0, count: int = GROUPS) -> StepBatch:
    """Build groups [first, first + count) of one global batch of GROUPS, with texts of 2 to 60 tokens."""
    random = np.random.default_rng(0)
    groups = [
        [random.integers(5, _VOCABULARY, random.integers(2, 60)) for _ in range(1 + PASSAGES)] for _ in range(GROUPS)
    ][first : first + count]
    texts = [query for query, *_ in groups] + [text for _, *passages in groups for text in passages]
    sizes = np.full(count, PASSAGES, dtype=np.int64)
    return StepBatch(0, [(0, i) for i in range(count)], texts, Groups(sizes))


def gradient(model: nn.Module, batch: StepBatch, precision: torch.dtype | None = None) -> Tensor:
    """Return the gradient of a step, fp32; in fp16 the loss is scaled meanwhile.

    Args:
        model: maps a batch to a loss.
        batch: the batch.
        precision: autocast, None for fp32.

    Returns:
        The gradients of all trained parameters as one vector.
    """
    device = next(model.parameters()).device
    scale = 2.0**12 if precision == torch.float16 else 1.0
    model.zero_grad()
    with torch.autocast(device.type, precision, enabled=precision is not None):
        loss = model(batch)
    (loss * scale).backward()
    return flat_gradient(model) / scale


def flat_gradient(model: nn.Module) -> Tensor:
    """Return the gradients of all trained parameters as one vector, whole ones of sharded parameters; collective."""
    grads: list[Any] = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([getattr(grad, "full_tensor", lambda grad=grad: grad)().float().flatten() for grad in grads])


def plain_gradient(device: torch.device) -> Tensor:
    """Return the gradient of the whole batch from the definition of InfoNCE: one text at a time, torch's own loss."""
    model, batch = build_embedding("bert", device), build_batch()
    vectors = torch.cat([model(*model.pad(batch.token_ids, [row])) for row in range(len(batch.token_ids))])
    scores_BN = vectors[:GROUPS] @ vectors[GROUPS:].T / TEMPERATURE
    target_B = torch.arange(GROUPS, device=device) * PASSAGES
    nn.functional.cross_entropy(scores_BN, target_B).backward()
    return flat_gradient(model)


def distance(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference divided by that of `other`."""
    return float((one - other).norm() / other.norm())
