"""The trained module: an embedding model with its objective, from token ids to a loss.

Letters in tensor names: B own queries, M own passages, N = B + M own texts, D width of a vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raybge.data.step_batch import Groups, StepBatch
from raybge.losses.global_batch import gather_counts
from raybge.losses.objective import Objective, Observe
from raybge.model.embedding import EmbeddingModel, eval_mode, gathers_by_layer, send
from raybge.model.encoder import CPU_TOKENS_PER_CHUNK
from raybge.model.precision import autocast_dtype

GPU_TOKENS_PER_CHUNK = 32_768


class ContrastiveModel(nn.Module):
    """An embedding model with its objective: maps a StepBatch to the worker's share of the loss.

    Args:
        embedding: the model to train.
        objective: the loss.
        pad_to_multiple_of: round the length of a chunk of texts up to a multiple of this.
        sub_batch_size: texts whose activations are held at a time; None holds those of all.
        guide: a model that identifies likely false negatives (`Objective.margin`); it is not trained.
        sub_batch_tokens: tokens, with padding, whose activations are held at a time; None does not limit them.
    """

    main_input_name = "batch"  # its tokens are those that transformers' Trainer counts

    def __init__(
        self,
        embedding: EmbeddingModel,
        objective: Objective,
        pad_to_multiple_of: int | None = None,
        sub_batch_size: int | None = None,
        guide: EmbeddingModel | None = None,
        sub_batch_tokens: int | None = None,
    ):
        super().__init__()
        self.embedding = embedding
        self.objective = objective
        self.pad_to_multiple_of = pad_to_multiple_of
        self.sub_batch_size = sub_batch_size
        self.sub_batch_tokens = sub_batch_tokens
        # In a tuple, so it is no submodule: the guide is neither saved nor trained nor wrapped.
        self._guide = (guide,)
        # Called with each batch and its embeddings e_ND, queries first, without gradient.
        self.embedding_hook: Callable[[Tensor, StepBatch], None] | None = None
        self.negatives_hook: Observe | None = None  # see `Objective.loss`

    def forward(self, batch: StepBatch) -> Tensor:
        """Compute the worker's share of the loss, a scalar; see `Objective.loss`. Collective."""
        queries = len(batch.groups.passages_B)
        e_ND = self._embed(self.embedding, batch.token_ids, in_sub_batches=True)
        if self.embedding_hook is not None:
            self.embedding_hook(e_ND.detach(), batch)
        guide = None
        if self._guide[0] is not None:
            assert batch.guide_ids is not None
            with torch.no_grad():
                guide_ND = self._embed(self._guide[0].eval(), batch.guide_ids)
            guide = guide_ND[:queries], guide_ND[queries:]
        groups = _to_tensors(batch.groups, e_ND.device)
        return self.objective.loss(e_ND[:queries], e_ND[queries:], groups, guide, self.negatives_hook)

    def largest_chunk(self, batch: StepBatch) -> tuple[int, int]:
        """Return the texts of the batch's largest chunk, and the tokens of its longest text."""
        chunks = self.embedding.plan([len(ids) for ids in batch.token_ids], *self._chunk_limits(in_sub_batches=True))
        chunk = max(chunks, key=lambda rows: len(rows) * len(batch.token_ids[rows[0]]))
        return len(chunk), len(batch.token_ids[chunk[0]])

    def _chunk_limits(self, in_sub_batches: bool) -> tuple[int, int | None, int | None, int | None]:
        """Return the arguments of `EmbeddingModel.plan` after the lengths."""
        device = next(self.embedding.parameters()).device
        on_cpu, tokens = device.type == "cpu", GPU_TOKENS_PER_CHUNK
        if on_cpu:
            # Twice as many activations of half the size fit into the caches.
            tokens = CPU_TOKENS_PER_CHUNK * (1 if autocast_dtype(device) is None else 2)
        if not in_sub_batches:
            return tokens, self.pad_to_multiple_of, None, None
        limit = self.sub_batch_tokens
        if limit is not None and on_cpu:
            limit = min(limit, tokens)  # larger chunks would be slower
        return tokens, self.pad_to_multiple_of, self.sub_batch_size, limit

    def _embed(self, model: EmbeddingModel, token_ids: list[np.ndarray], in_sub_batches: bool = False) -> Tensor:
        """Return e_ND of the texts in their order; see `EmbeddingModel.embed`."""
        tokens, multiple, sub_batch_size, sub_batch_tokens = limits = self._chunk_limits(in_sub_batches)
        # A worker without rows takes part in every collective, those of the gradient too.
        chunks = 1
        if gathers_by_layer(model):
            own = len(model.plan([len(ids) for ids in token_ids], *limits))
            chunks = max(1, *gather_counts([own], next(model.parameters()).device)[0])
        return model.embed(token_ids, tokens, multiple, sub_batch_size, chunks, sub_batch_tokens)

    @torch.no_grad()
    def finite_groups(self, batch: StepBatch) -> list[bool]:
        """Return for each group True if all its embeddings are finite. Without dropout: draws no random number."""
        passages_B = batch.groups.passages_B
        with eval_mode(self.embedding):
            e_ND = self._embed(self.embedding, batch.token_ids)
        finite_N = e_ND.isfinite().all(dim=1).cpu()
        finite_B, finite_M = finite_N.split([len(passages_B), len(finite_N) - len(passages_B)])
        groups = finite_M.split(passages_B.tolist())
        return [bool(query and group.all()) for query, group in zip(finite_B, groups, strict=True)]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoint the backbone's layers; transformers' Trainer calls it for `--gradient_checkpointing`."""
        self.embedding.backbone.gradient_checkpointing_enable(*args, **kwargs)


def _to_tensors(groups: Groups[np.ndarray], device: torch.device) -> Groups[Tensor]:
    """Return the groups as tensors, `alone_B` as None where no query is alone: most steps then need no mask."""
    if groups.alone_B is not None and not groups.alone_B.any():
        groups = dataclasses.replace(groups, alone_B=None)
    arrays = {name: array for name, array in vars(groups).items() if array is not None}
    return Groups(**{name: send(array, device) for name, array in arrays.items()})
