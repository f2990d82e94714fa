"""Attention of transformers' models in training: fast with dropout on a CPU, packed on a GPU.

Packed texts are concatenated into one row of tokens without padding, and each attends to itself alone.

Letters in tensor names: B texts, E = B + 1 bounds of texts, H heads, T tokens, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from raybge.compat.torch import efficient_attention, flash_attention
from raybge.compat.transformers import attention_implementation
from raybge.model.dropout import Dropout, DropoutAttention
from raybge.model.precision import autocast_dtype

NAME = "raybge"  # in transformers' AttentionInterface
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PackedTexts:
    """Bounds of texts that are concatenated into one row. One object serves all layers, and their recomputation.

    Args:
        lengths: tokens of each text, at least 1.
        bound_E: first token of each text and the end of the last, int32, on the model's device.
    """

    lengths: tuple[int, ...]
    bound_E: Tensor

    @cached_property  # every layer reads it
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(self.lengths)


def use_fast_attention(backbone: nn.Module) -> None:
    """Switch a transformers model to this module's attention and dropout; a model with its own attention keeps it."""
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))
    if isinstance(backbone, transformers.PreTrainedModel) and attention_implementation(backbone) == "sdpa":
        backbone.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    packed: PackedTexts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers' AttentionInterface.

    It is torch's own attention except for packed texts and for dropout on a CPU.

    Args:
        module: the attention layer.
        query: (B, H, T, D); B is 1 for packed texts.
        key: like query, with fewer heads in grouped-query attention.
        value: like key.
        attention_mask: (B or 1, 1, T, T): bool, True where a query attends to a key, or numbers added to the scores.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores; None: 1 / sqrt(D).
        is_causal: a token attends to earlier ones only; None: the setting of the layer.
        packed: bounds of packed texts, in which case the mask is ignored; None: texts are padded.
        **kwargs: other arguments of transformers.

    Returns:
        (B, T, H, D), and None in place of the weights.

    Raises:
        NotImplementedError: packed texts in a model with a position bias, a soft cap or a sliding window.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    plain = kwargs.get("position_bias") is None and kwargs.get("softcap") is None
    if packed is not None:
        if not plain or kwargs.get("sliding_window") is not None:
            raise NotImplementedError(
                "packed texts are not supported with a position bias, a soft cap or a sliding window"
            )
        return _packed_attention(query, key, value, packed, dropout, scaling, causal), None
    fast_dropout = (
        plain
        and 0 < dropout < 1
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.shape == key.shape == value.shape
        and (attention_mask is not None or not causal)
    )
    if not fast_dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_BHTD = DropoutAttention.apply(query, key, value, attention_mask, dropout, scale)
    return out_BHTD.transpose(1, 2).contiguous(), None


def _packed_attention(
    query: Tensor, key: Tensor, value: Tensor, texts: PackedTexts, dropout: float, scale: float | None, causal: bool
) -> Tensor:
    """Return each text's attention to itself, (1, T, H, D): variable-length kernels on a GPU, a loop on a CPU."""
    dtype = autocast_dtype(query.device) or value.dtype  # layers that normalize queries and keys return them in fp32
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    if not has_packed_kernels(query.device):
        return _attention_by_text(q_THD, k_THD, v_THD, texts, dropout, scale, causal)
    if dtype in HALF and supports_flash_attention(query.device):
        return flash_attention(q_THD, k_THD, v_THD, texts.bound_E, texts.longest, dropout, scale, causal)[None]
    k_THD, v_THD = _repeat_heads(k_THD, q_THD), _repeat_heads(v_THD, q_THD)
    return efficient_attention(q_THD, k_THD, v_THD, texts.bound_E, texts.longest, dropout, scale, causal)[None]


def has_packed_kernels(device: torch.device) -> bool:
    """Return True if torch has attention for packed texts on a device. A CPU loses nothing by padded chunks."""
    return device.type == "cuda"


def supports_flash_attention(device: torch.device) -> bool:
    """Return True if a GPU is new enough for FlashAttention: Ampere or later."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _attention_by_text(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, texts: PackedTexts, dropout: float, scale: float | None, causal: bool
) -> Tensor:
    k_THD, v_THD = _repeat_heads(k_THD, q_THD), _repeat_heads(v_THD, q_THD)
    options: dict[str, Any] = {"dropout_p": dropout, "is_causal": causal, "scale": scale}
    parts = [
        scaled_dot_product_attention(*(x[None].transpose(1, 2) for x in part), **options)
        for part in zip(*(x.split(texts.lengths) for x in (q_THD, k_THD, v_THD)), strict=True)
    ]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1)


def _repeat_heads(x_THD: Tensor, q_THD: Tensor) -> Tensor:
    """Return keys or values with as many heads as the queries (grouped-query attention)."""
    return x_THD.repeat_interleave(q_THD.shape[1] // x_THD.shape[1], dim=1)


transformers.AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
