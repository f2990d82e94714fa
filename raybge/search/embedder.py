"""Embedder: description of the model that makes vectors, and its use in Ray actors.

Letters in array names: N texts, D width of a vector.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from raybge.cluster.resources import Plan
from raybge.data.prompts import Instructions
from raybge.model.folder import vector_width
from raybge.model.spec import EncoderSpec
from raybge.search.model_identity import model_identity
from raybge.util.digest import digest
from raybge.util.versions import RAYBGE

DEFAULT_DIM = 1024  # width assumed in the memory plan if the model's configuration does not state one


@dataclass(frozen=True)
class Embedder:
    """Model that makes vectors, loaded once in each actor that needs it.

    Args:
        load: returns an Encoder on the device that it receives; it also sets the number of threads of the process.
        identity: digest of everything that the vectors depend on.
        dim: width of the vectors, for the memory plan.
        tokenized: model whose texts CPU tasks tokenize, ahead of the actors; None: the actors do it.
    """

    load: Callable[[str], Any]
    identity: str
    dim: int
    tokenized: EncoderSpec | None = None


def make_embedder(model: EncoderSpec, plan: Plan) -> Embedder:
    """Return the embedder of a model; its identity includes the device type, since a GPU computes other vectors."""
    name = model.model_name_or_path, model.cache_dir
    identity = digest(RAYBGE, model_identity(*name), model.keywords(), plan.gpus)
    # On CPUs tokenizing takes a twentieth of the time of the model, and tasks for it would take its cores.
    tokenized = model if plan.gpus else None
    return Embedder(partial(_load_encoder, model, plan.cpus), identity, vector_width(*name) or DEFAULT_DIM, tokenized)


def _load_encoder(model: EncoderSpec, threads: int, device: str) -> Any:
    import torch

    torch.set_num_threads(threads)
    return model.load(devices=device)


def device_of(plan: Plan) -> str:
    """Return the device of an actor: "cuda:0" or "cpu". An actor sees only its own GPU."""
    return "cuda:0" if plan.gpus else "cpu"


class TextEncoder:
    """Encodes texts in an actor, for one thread at a time; the model is loaded at the first call."""

    def __init__(self, embedder: Embedder, device: str) -> None:
        """Remember the model; nothing is loaded yet.

        Args:
            embedder: the model.
            device: torch device.
        """
        self._embedder, self._device = embedder, device
        self._encoder: Any = None
        self.lock = threading.RLock()

    def load(self) -> None:
        """Load the model if it is not loaded."""
        with self.lock:
            if self._encoder is None:
                self._encoder = self._embedder.load(self._device)

    def take_instructions(self) -> Instructions:
        """Return the model's instructions, which it then no longer applies; it is loaded if it is not."""
        with self.lock:
            self.load()
            instructions: Instructions = self._encoder.instructions
            self._encoder.instructions = Instructions(query="", passage="")
            return instructions

    @property
    def padding_reason(self) -> str | None:
        """Reason why texts are padded on a GPU; None if they are packed, on a CPU, and before the model has run."""
        return getattr(self._encoder, "padding_reason", None)

    def encode_token_ids(self, token_ids: Sequence[np.ndarray], kind: str) -> np.ndarray:
        """Encode texts that are tokenized by `load_text_tokenizer`; otherwise like a call."""
        with self.lock:
            self.load()
            encoder = self._encoder
            max_length = encoder.query_max_length if kind == "query" else encoder.passage_max_length
            return finite_vectors(encoder.encode_token_ids(token_ids, max_length))

    def __call__(self, texts: list[str], kind: str | None) -> np.ndarray:
        """Encode texts.

        Args:
            texts: N texts.
            kind: "query" or "passage" applies that instruction and maximum length; None applies no instruction.

        Returns:
            Vectors (N, D) float32.
        """
        method = {"query": "encode_queries", "passage": "encode_corpus", None: "encode"}[kind]
        with self.lock:
            self.load()
            return finite_vectors(getattr(self._encoder, method)(texts, convert_to_numpy=True))


def padding_message(reason: str) -> str:
    """Return the line on texts that are padded on a GPU."""
    return f"texts are padded, not packed: {reason}"


def finite_vectors(vectors_ND: Any) -> np.ndarray:
    """Return the vectors as contiguous float32.

    Args:
        vectors_ND: vectors of a model.

    Returns:
        (N, D) float32.

    Raises:
        RuntimeError: a vector holds inf or nan.
    """
    if not np.isfinite(vectors_ND).all():
        raise RuntimeError("the model returns vectors with inf or nan: use --use_bf16 True or --use_fp16 False")
    return np.ascontiguousarray(vectors_ND, np.float32)
