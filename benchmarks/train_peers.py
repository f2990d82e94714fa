"""The programs that train_speed.py compares: raybge, sentence-transformers and FlagEmbedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TEMPERATURE = 0.02


@dataclass(frozen=True)
class Batch:
    """Token ids of B queries, their B positives and B negatives."""

    queries: list[list[int]]
    positives: list[list[int]]
    negatives: list[list[int]]

    @property
    def texts(self) -> list[list[int]]:
        """Token ids of all texts."""
        return self.queries + self.positives + self.negatives


@dataclass
class Peer:
    """A model in training: `loss` takes the result of `prepare` for a batch."""

    name: str
    model: nn.Module
    prepare: Callable[[Batch], Any]
    loss: Callable[[Any], Tensor]
    dtype: torch.dtype | None = None  # of autocast

    def autocast(self, device: str) -> torch.autocast:
        """Return the context of a forward pass."""
        return torch.autocast(device, self.dtype or torch.bfloat16, enabled=self.dtype is not None)


# --- the peers --------------------------------------------------------------------------------------------------------


def raybge_peer(folder: str, device: str, _: Any, dtype: torch.dtype | None) -> Peer:
    """Build raybge's model and loss."""
    from raybge.data.step_batch import Groups, StepBatch
    from raybge.losses.contrastive_model import ContrastiveModel
    from raybge.losses.objective import Objective
    from raybge.model.encoder import Encoder
    from raybge.model.packing import prepare_for_training

    embedding = Encoder(folder, use_fp16=False, devices=device, normalize_embeddings=True, pooling_method="mean").model
    prepare_for_training(embedding, dtype)
    model = ContrastiveModel(embedding, Objective(TEMPERATURE), None)

    def prepare(batch: Batch) -> StepBatch:
        groups = len(batch.queries)
        passages = [p for pair in zip(batch.positives, batch.negatives, strict=True) for p in pair]
        keys_M = np.arange(2 * groups)  # all texts differ
        return StepBatch(
            step=0,
            rows=[(0, i) for i in range(groups)],
            token_ids=[np.array(ids, np.int32) for ids in batch.queries + passages],
            groups=Groups(
                passages_B=np.full(groups, 2, np.int64),
                passage_key_M=keys_M,
                known_B=np.ones(groups, np.int64),
                known_key_R=keys_M[::2],
            ),
        )

    return Peer("raybge", model, prepare, model)


Pad = Callable[[list[list[int]]], dict[str, Tensor]]


def sentence_transformers_peer(folder: str, device: str, pad: Pad, _: Any) -> Peer:
    """Build the model and loss of sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(folder, device=device)
    loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)

    def prepare(batch: Batch) -> list[dict[str, Tensor]]:
        return [pad(column) for column in (batch.queries, batch.positives, batch.negatives)]

    def run(columns: list[dict[str, Tensor]]) -> Tensor:
        return loss([{name: x.to(device) for name, x in column.items()} for column in columns], None)

    return Peer("sentence-transformers", model, prepare, run)


def flag_embedding_peer(folder: str, device: str, pad: Pad, _: Any) -> Peer:
    """Build FlagEmbedding's model, which computes its loss."""
    from FlagEmbedding.finetune.embedder.encoder_only.base import BiEncoderOnlyEmbedderModel
    from transformers import AutoModel

    base = AutoModel.from_pretrained(folder)
    model = BiEncoderOnlyEmbedderModel(
        base, temperature=TEMPERATURE, sentence_pooling_method="mean", normalize_embeddings=True
    ).to(device)

    def prepare(batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        passages = [p for pair in zip(batch.positives, batch.negatives, strict=True) for p in pair]
        return pad(batch.queries), pad(passages)

    def run(sides: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Tensor:
        queries, passages = ({name: x.to(device) for name, x in side.items()} for side in sides)
        return model(queries=queries, passages=passages).loss

    return Peer("FlagEmbedding", model, prepare, run)


PEERS = {
    "raybge": raybge_peer,
    "sentence-transformers": sentence_transformers_peer,
    "FlagEmbedding": flag_embedding_peer,
}
