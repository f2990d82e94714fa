"""Enhanced decoder of RetroMAE (Xiao et al. 2022, https://arxiv.org/abs/2205.12035, section 3.3).

Letters in tensor names: B texts, T tokens of the longest, D width, d width of an attention head, R subsets of visible
tokens, S bytes that hold one bit per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from raybge.data.masking import MaskedText
from raybge.model.attention import attention
from raybge.model.dropout import Dropout
from raybge.model.embedding import send


class EnhancedDecoder(nn.Module):
    """A transformer layer that reconstructs each token of a text from its position and the text's CLS vector.

    The query of position i is the CLS vector plus the position embedding of i. Keys and values are the CLS vector, in
    place of the first token, and the token embeddings with their positions. Width, heads, dropout and initial weights
    are those of the encoder, as in the reference implementation.

    Args:
        config: the encoder's configuration.
        positions: rows of an own table of position embeddings, for encoders without one (rotary positions); 0: none.
    """

    def __init__(self, config: Any, positions: int = 0):
        super().__init__()
        dim = config.hidden_size
        eps = _config_value(config, 1e-12, "layer_norm_eps", "norm_eps")
        self.heads = config.num_attention_heads
        self.attention_dropout = _config_value(config, 0.0, "attention_probs_dropout_prob", "attention_dropout")
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.widen, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = Dropout(_config_value(config, 0.0, "hidden_dropout_prob", "dropout", "mlp_dropout"))
        self.positions = nn.Embedding(positions, dim) if positions else None
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=_config_value(config, 0.02, "initializer_range"))
        self.middle_norm, self.norm = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)

    def forward(self, cls_BD: Tensor, token_BTD: Tensor, position_TD: Tensor, visible_BTT: Tensor) -> Tensor:
        """Compute the output at each position.

        Args:
            cls_BD: the encoder's CLS vectors.
            token_BTD: token embeddings with their positions; the first token's is ignored.
            position_TD: position embeddings alone.
            visible_BTT: bool, True where a position (middle axis) attends to a context token (last axis); at least one
                per position.

        Returns:
            (B, T, D).
        """
        query_BTD = cls_BD[:, None] + position_TD
        context_BTD = torch.cat([cls_BD[:, None], token_BTD[:, 1:]], dim=1)
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query_BTD), (self.key, context_BTD), (self.value, context_BTD))
        )
        dropout = self.attention_dropout if self.training else 0.0
        attended_BTHd, _ = attention(self, q, k, v, visible_BTT[:, None], dropout, is_causal=False)
        h_BTD = self.middle_norm(query_BTD + self.dropout(self.out(attended_BTHd.flatten(2))))
        return self.norm(h_BTD + self.dropout(self.narrow(gelu(self.widen(h_BTD)))))


def visible_context(texts: Sequence[MaskedText], width: int, device: torch.device) -> Tensor:
    """Return the decoder's attention mask.

    A position attends to the tokens of its own random subset, never to itself, and always to the first token, which the
    CLS vector replaces.

    Args:
        texts: B texts with their random subsets.
        width: T, at least the length of the longest text.
        device: device of the mask.

    Returns:
        bool (B, T, T), True where a position (middle axis) attends to a context token (last axis).
    """
    bits_BTS = np.zeros((len(texts), width, -(-width // 8)), np.uint8)
    for b, text in enumerate(texts):
        own_TS = text.visible_RS[text.pick_T]
        bits_BTS[b, : own_TS.shape[0], : own_TS.shape[1]] = own_TS
    visible_BTT = send(np.unpackbits(bits_BTS, axis=2, count=width).view(bool), device)
    visible_BTT.diagonal(dim1=1, dim2=2).fill_(False)
    visible_BTT[:, :, 0] = True
    return visible_BTT


def _config_value(config: Any, default: float, *names: str) -> float:
    """Return the value of the first of `names` that a configuration has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)
