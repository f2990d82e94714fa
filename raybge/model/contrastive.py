"""The module that training trains: an embedding model with its objective, from token ids to a loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from raybge.data.collate import StepBatch
from raybge.model.embedding import EmbeddingModel
from raybge.model.encoder import CPU_TOKENS_PER_CHUNK
from raybge.model.negatives import Objective

GPU_TOKENS_PER_CHUNK = 32_768


class ContrastiveModel(nn.Module):
    """An embedding model with its objective: maps a StepBatch to the worker's share of the loss."""

    def __init__(self, embedding: EmbeddingModel, objective: Objective, pad_to_multiple_of: int | None):
        super().__init__()
        self.embedding = embedding
        self.objective = objective
        self.pad_to_multiple_of = pad_to_multiple_of

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """The share of the loss as a scalar; see `Objective.loss`."""
        device = next(self.parameters()).device
        chunk = CPU_TOKENS_PER_CHUNK if device.type == "cpu" else GPU_TOKENS_PER_CHUNK
        queries = len(batch.passages_B)
        # A worker without rows still has to take part in every collective, the gradient's too: one token, of which no
        # vector is kept, gives every parameter a gradient of zero.
        token_ids = batch.token_ids or [np.zeros(1, dtype=np.int64)]
        e_ND = self.embedding.embed(token_ids, chunk, self.pad_to_multiple_of)[: len(batch.token_ids)]
        passages_B = torch.from_numpy(batch.passages_B).to(device)
        return self.objective.loss(e_ND[:queries], e_ND[queries:], passages_B)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.embedding.backbone.gradient_checkpointing_enable(*args, **kwargs)
