"""Specs of models: which model is loaded and how, resolved once from a command's options.

    spec = EncoderSpec.from_options(options, query_max_length=None)
    encoder = spec.load(devices="cpu")

A spec is frozen, hashable and picklable, and importing this module imports no torch: the driver makes a spec and each
worker loads its own model from it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from raybge.model.backends.choice import TORCH, BackendChoice

if TYPE_CHECKING:
    from raybge.model.encoder import Encoder
    from raybge.model.inference import Devices
    from raybge.model.lora import Lora
    from raybge.model.reranker import Reranker

# Canonical option fields whose name differs from Encoder's keyword argument.
_ENCODER_FIELDS = {"query_max_length": "query_max_len", "passage_max_length": "passage_max_len"}
# Option fields of a cross-encoder, by Reranker's keyword argument.
_RERANKER_FIELDS = {
    "model_name_or_path": "cross_encoder",
    "batch_size": "reranker_batch_size",
    "max_length": "reranker_max_length",
    "query_max_length": "reranker_query_max_length",
}


@dataclass(frozen=True)
class _ModelSpec:
    """Base of the specs of both kinds of model: devices are hashable, fields become keyword arguments."""

    def __post_init__(self) -> None:
        """Turn a list of devices into a tuple, which is hashable."""
        devices = getattr(self, "devices", None)
        if isinstance(devices, list):
            object.__setattr__(self, "devices", tuple(devices))

    def keywords(self) -> dict[str, Any]:
        """Return the constructor's keyword arguments by name: JSON values only, unless `lora` is set.

        Their digest identifies in a store what the model computes.
        """
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class EncoderSpec(_ModelSpec):
    """Keyword arguments of an `Encoder`, with the same names and defaults; see `Encoder` for their meaning."""

    model_name_or_path: str
    normalize_embeddings: bool | None = None
    use_fp16: bool | None = None
    query_instruction_for_retrieval: str | None = None
    query_instruction_format: str = "{}{}"
    passage_instruction_for_retrieval: str | None = None
    passage_instruction_format: str = "{}{}"
    devices: Devices = None
    pooling_method: str | None = None
    trust_remote_code: bool = False
    cache_dir: str | None = None
    batch_size: int = 256
    query_max_length: int | None = None
    passage_max_length: int | None = None
    convert_to_numpy: bool = True
    tokenizer_name: str | None = None
    config_name: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    use_fast_tokenizer: bool = True
    truncate_dim: int | None = None
    lora: Lora | None = None
    use_bf16: bool | None = None
    encode_backend: str = "torch"
    encode_precision: str | None = None
    export_dir: str | None = None

    @classmethod
    def from_options(cls, options: Any, **overrides: Any) -> Self:
        """Read the fields that a command's options have under Encoder's names; the rest stay at their defaults.

        `query_max_len` and `passage_max_len` become `query_max_length` and `passage_max_length`; an options class with
        one `max_length` for all texts (`EncodeOptions`) sets both. A local model path becomes absolute.

        Args:
            options: an options object, such as `MineOptions`.
            **overrides: keyword arguments of `Encoder` that take precedence over the options, None included. Needed
                where an option of the same name means something else: fine-tuning limits the lengths in its tokenizer
                (`query_max_length=None, passage_max_length=None`), and merging's `batch_size` counts examples.

        Returns:
            The spec; flags that mean the same precision give equal ones.

        Raises:
            UserError: the flags of backend, precision and device do not fit each other.
        """
        names = dict(_ENCODER_FIELDS)
        if hasattr(options, "max_length"):
            names = dict.fromkeys(_ENCODER_FIELDS, "max_length")
        values = _values(cls, options, names, overrides)
        if "encode_backend" in values:
            choice = BackendChoice.of(values["encode_backend"], values["encode_precision"], values["use_bf16"])
            choice.check_device(getattr(options, "use_gpu", None))
            values.update(_precision_values(choice, values["use_fp16"]))
        return cls(**values)

    @property
    def backend(self) -> BackendChoice:
        """Backend and precision."""
        return BackendChoice.of(self.encode_backend, self.encode_precision, self.use_bf16)

    def in_fp32(self) -> Self:
        """Return the spec of the same model in torch and fp32."""
        return dataclasses.replace(
            self, encode_backend=TORCH, encode_precision=None, export_dir=None, use_fp16=False, use_bf16=False
        )

    def check(self, texts: Callable[[], Sequence[str]] | None = None) -> None:
        """Check configuration and tokenizer, and that most words of a sample are known; see `check_model`."""
        from raybge.model.preflight import check_model

        check_model(
            self.model_name_or_path,
            texts,
            self.tokenizer_name,
            self.config_name,
            self.use_fast_tokenizer,
            cache_dir=self.cache_dir,
            token=self.token,
            trust_remote_code=self.trust_remote_code,
        )

    def load(self, **more: Any) -> Encoder:
        """Load the model; `more` are keyword arguments that replace the spec's, such as `devices`."""
        from raybge.model.encoder import Encoder

        return Encoder(**{**self.keywords(), **more})


@dataclass(frozen=True)
class RerankerSpec(_ModelSpec):
    """Keyword arguments of a `Reranker`, with the same names and defaults; see `Reranker` for their meaning."""

    model_name_or_path: str
    use_fp16: bool | None = None
    devices: Devices = None
    trust_remote_code: bool = False
    cache_dir: str | None = None
    batch_size: int = 256
    max_length: int | None = None
    query_max_length: int | None = None
    use_bf16: bool | None = None

    @classmethod
    def from_options(cls, options: Any, **overrides: Any) -> Self:
        """Read the cross-encoder's fields of a command's options; the rest stay at their defaults.

        They are `cross_encoder`, `reranker_batch_size`, `reranker_max_length`, `reranker_query_max_length` and, shared
        with the encoder, `use_fp16`, `use_bf16`, `trust_remote_code` and `cache_dir`. A local path becomes absolute.

        Args:
            options: an options object, such as `MineOptions`.
            **overrides: keyword arguments of `Reranker` that take precedence over the options, None included.

        Returns:
            The spec.
        """
        return cls(**_values(cls, options, _RERANKER_FIELDS, overrides))

    def check(self, texts: Callable[[], Sequence[str]] | None = None) -> None:
        """Check configuration and tokenizer, and that most words of a sample are known; see `check_model`."""
        from raybge.model.folder import FolderSettings
        from raybge.model.preflight import check_model

        check_model(
            self.model_name_or_path,
            texts,
            settings=FolderSettings(),
            cache_dir=self.cache_dir,
            trust_remote_code=self.trust_remote_code,
        )

    def load(self, **more: Any) -> Reranker:
        """Load the model; `more` are keyword arguments that replace the spec's, such as `devices`."""
        from raybge.model.reranker import Reranker

        return Reranker(**{**self.keywords(), **more})


def _precision_values(choice: BackendChoice, use_fp16: bool | None) -> dict[str, Any]:
    """Return the fields of a choice: precisions of torch are stated by `use_fp16` and `use_bf16` alone."""
    if choice.exported:
        return {"encode_precision": choice.precision, "use_fp16": None, "use_bf16": None}
    use_fp16, use_bf16 = choice.half_precision(use_fp16)
    return {"encode_precision": None, "use_fp16": use_fp16, "use_bf16": use_bf16}


def absolute_model_path(name: str) -> str:
    """Return a local model path as an absolute one, since a worker's current folder is Ray's; a hub name unchanged."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _values(spec: type, options: Any, renamed: dict[str, str], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return a spec's field values from options whose field names may be `renamed`, then the overrides."""
    sources = {field.name: renamed.get(field.name, field.name) for field in dataclasses.fields(spec)}
    values = {name: getattr(options, source) for name, source in sources.items() if hasattr(options, source)}
    values.update(overrides)
    values["model_name_or_path"] = absolute_model_path(values["model_name_or_path"] or "")
    return values
