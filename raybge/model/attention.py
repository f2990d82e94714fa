"""The attention that training uses in transformers' models: fast under dropout on a CPU, packed on a GPU.

Packed texts lie one after the other in one row of tokens, so none is padded, and each attends to itself alone.

Letters in tensor names: B texts, H heads, T tokens, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from raybge.compat.transformers import attention_implementation
from raybge.model.dropout import Dropout, DropoutAttention

NAME = "raybge"  # among the attentions of transformers


def use_fast_attention(backbone: nn.Module) -> None:
    """Let a transformers model attend and drop as this module does; a model with an attention of its own keeps it."""
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
    text_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' AttentionInterface calls it: torch's own attention, but for packed texts and dropout on a CPU.

    Args:
        query, key, value: (B, H, T, D); B is 1 for packed texts.
        attention_mask: bool, True where a query sees a key, or numbers that are added to the scores; (B or 1, 1, T, T).
        text_lengths: tokens of each packed text; the mask is not looked at.

    Returns:
        (B, T, H, D), and no weights.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    plain = kwargs.get("position_bias") is None and kwargs.get("softcap") is None
    if text_lengths is not None:
        if not plain or kwargs.get("sliding_window") is not None:
            raise NotImplementedError("packed texts with a position bias, a soft cap or a sliding window")
        return _packed(query, key, value, text_lengths, dropout, scaling, causal), None
    ours = (
        plain
        and 0 < dropout < 1
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.float32
        and query.shape == key.shape == value.shape
        and (attention_mask is not None or not causal)
    )
    if not ours:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_BHTD = DropoutAttention.apply(query, key, value, attention_mask, dropout, scale)
    return out_BHTD.transpose(1, 2).contiguous(), None


def _packed(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], dropout: float, scale: float | None, causal: bool
) -> Tensor:
    """Each text's attention to itself, (1, T, H, D): torch's variable-length kernels on a GPU, a loop elsewhere."""
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    options: dict[str, Any] = {"dropout_p": dropout, "is_causal": causal, "scale": scale}
    if q_THD.shape[1] != k_THD.shape[1]:  # heads that share keys and values
        times = q_THD.shape[1] // k_THD.shape[1]
        k_THD, v_THD = k_THD.repeat_interleave(times, dim=1), v_THD.repeat_interleave(times, dim=1)
    if query.device.type == "cpu":
        parts = [
            scaled_dot_product_attention(*(x[None].transpose(1, 2) for x in part), **options)
            for part in zip(*(x.split(list(lengths)) for x in (q_THD, k_THD, v_THD)), strict=True)
        ]
        return torch.cat([part.transpose(1, 2) for part in parts], dim=1)
    ends = torch.tensor([0, *lengths], device=query.device).cumsum(0)
    shortest, longest = min(lengths), max(lengths)
    jagged = [
        torch.nested.nested_tensor_from_jagged(x.contiguous(), ends, min_seqlen=shortest, max_seqlen=longest)
        for x in (q_THD, k_THD, v_THD)
    ]
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in jagged), **options)
    return out.transpose(1, 2).values()[None]


transformers.AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
