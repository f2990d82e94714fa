"""Comparison of an exported model with the one in torch: the cosines of their vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from raybge.model.backends.choice import BackendChoice
from raybge.model.backends.sessions import ExportedBackbone, open_session
from raybge.model.embedding import EmbeddingModel
from raybge.model.inference import embed_texts

TOKENS_PER_CHUNK = 2048


def cosines(
    model: EmbeddingModel, path: str, choice: BackendChoice, token_ids: Sequence[np.ndarray]
) -> dict[str, float | int]:
    """Compare vectors of an exported model with those of the model in torch.

    Args:
        model: the model in torch, in fp32.
        path: its .onnx or .xml file.
        choice: backend and precision.
        token_ids: ids of N texts.

    Returns:
        "mean" and "min" of the cosines, and the number of "texts".
    """
    run = open_session(path, choice.backend, choice.precision or "fp32", torch.get_num_threads())
    exported = EmbeddingModel(ExportedBackbone(run, model.backbone), model.pooling, model.normalize)
    texts = len(token_ids), max(map(len, token_ids))
    a_ND, b_ND = (
        embed_texts([each], [token_ids], *texts, model.dim, TOKENS_PER_CHUNK, False) for each in (model, exported)
    )
    cosine_N = torch.nn.functional.cosine_similarity(a_ND, b_ND)
    return {
        "mean": round(float(cosine_N.mean()), 5),
        "min": round(float(cosine_N.min()), 5),
        "texts": len(token_ids),
    }
