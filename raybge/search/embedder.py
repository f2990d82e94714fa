"""Embedder: description of the model that makes vectors, and its use in Ray actors.

Letters in array names: N texts, D width of a vector.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from raybge.cluster.resources import Plan
from raybge.data.prompts import Instructions
from raybge.model.backends.exported_models import find_exported, find_or_export
from raybge.model.folder import vector_width
from raybge.model.model_identity import model_identity
from raybge.model.spec import EncoderSpec
from raybge.util.digest import digest
from raybge.util.errors import UserError
from raybge.util.filesystem import append_to_path
from raybge.util.versions import RAYBGE

if TYPE_CHECKING:
    from raybge.cli.console import Console

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
    keywords = {**model.keywords(), "export_dir": None}  # the exported model counts, not its place
    identity = digest(RAYBGE, model_identity(*name), keywords, plan.gpus, exported_digest(model))
    # On CPUs tokenizing takes a twentieth of the time of the model, and tasks for it would take its cores.
    tokenized = model if plan.gpus else None
    return Embedder(partial(_load_encoder, model, plan.cpus), identity, vector_width(*name) or DEFAULT_DIM, tokenized)


def with_export_dir(model: EncoderSpec, work: str, storage_path: str | None) -> EncoderSpec:
    """Return the spec with the folder of its export, if it does not run in torch.

    Args:
        model: the model.
        work: folder of the command's intermediate results.
        storage_path: --storage_path, whose exports all commands share; None: the export is part of `work`.

    Returns:
        The spec.
    """
    if not model.backend.exported:
        return model
    return replace(model, export_dir=append_to_path(storage_path or work, "/exports"))


def prepare_export(model: EncoderSpec, console: Console) -> None:
    """Export a model unless it runs in torch or its export exists, so that no actor has to.

    Args:
        model: the model, with the folder of its export.
        console: names the phase, and prints the backend.

    Raises:
        UserError: the model cannot be exported.
    """
    if model.backend.exported:
        with console.phase(f"exporting the model to {model.encode_backend}"):
            exported = find_or_export(model.keywords(), model.backend)
        console.info(exported.describe())


def exported_digest(model: EncoderSpec) -> str | None:
    """Return the digest of a model's export; None for a model in torch, and before the export of a dry run."""
    exported = find_exported(model.keywords(), model.backend) if model.backend.exported else None
    return exported.digest if exported else None


def _load_encoder(model: EncoderSpec, threads: int, device: str) -> Any:
    import torch

    torch.set_num_threads(threads)
    if model.backend.exported and find_exported(model.keywords(), model.backend) is None:
        raise UserError(
            f"--encode_backend {model.encode_backend}: this node does not see the export in {model.export_dir}: "
            "set --storage_path to a folder that all nodes share"
        )
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
