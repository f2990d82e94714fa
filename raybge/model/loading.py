"""Opening a model's parts, from a folder or the hub: the transformers backbone with its adapters, and the tokenizer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from raybge.errors import UserError, first_line
from raybge.model.folder import FolderSettings
from raybge.model.lora import Lora, check_continues, load_adapters, merged


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Args:
        name: a folder, or a name on the hub; `settings` is what it says (`read_settings`).
        config_name: another configuration than its own.
        cache_dir, token, trust_remote_code: as transformers takes them.
    """

    name: str
    settings: FolderSettings
    config_name: str | None = None
    cache_dir: str | None = None
    token: str | bool | None = None
    trust_remote_code: bool = False

    @property
    def hub(self) -> dict[str, Any]:
        return {"cache_dir": self.cache_dir, "token": self.token, "trust_remote_code": self.trust_remote_code}

    @property
    def adapter_options(self) -> dict[str, Any]:
        """Where peft finds the folder's adapters."""
        return {
            "cache_dir": self.cache_dir,
            "token": self.token,
            "subfolder": self.settings.subfolder or None,
        }


def load_backbone(source: Source, dtype: torch.dtype, lora: Lora | None = None) -> Any:
    """The transformers model with every weight from the file: a missing one would be random, without a word.

    A folder of adapters is merged into its base model, or with `lora` trained further. With `lora`, a plain model gets
    new adapters. Raises UserError for what is missing, damaged or of another size.
    """
    settings = source.settings
    if settings.base is None:
        if lora and settings.subfolder and not os.path.isdir(source.name):
            raise UserError(f"adapters cannot belong to {source.name}: its weights lie in {settings.subfolder}")
        backbone = _load(source, source.name, settings.subfolder, dtype)
        return lora.apply(backbone) if lora else backbone
    # in fp32: a half-precision sum would round the adapters away
    backbone = _load(source, settings.base, "", torch.float32)
    if lora is None:
        return merged(backbone, source.name, source.adapter_options).to(dtype)
    check_continues(lora, source.name, settings.adapter)
    lora.apply(backbone)
    load_adapters(backbone, source.name, source.adapter_options)
    return backbone


def load_classifier(source: Source, dtype: torch.dtype) -> Any:
    """The transformers model with its classifying head, every weight from the file. Raises as `load_backbone` does."""
    return _load(source, source.name, "", dtype, transformers.AutoModelForSequenceClassification)


def _load(source: Source, name: str, subfolder: str, dtype: torch.dtype, auto: Any = transformers.AutoModel) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(
            source.config_name or name, subfolder="" if source.config_name else subfolder, **source.hub
        )
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(f"the model {name} has an encoder and a decoder: expected one of the two")
        if hasattr(config, "use_cache"):
            config.use_cache = False  # of use when text is generated only
        backbone, loading = auto.from_pretrained(
            name,
            config=config,
            subfolder=subfolder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below
            **source.hub,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # gone or damaged
        raise UserError(f"the model {name} does not load: {first_line(error)}") from error
    check_weights(name, backbone, loading)
    if os.path.isdir(name):
        # what adapters name as their base: it must be found from any current folder
        backbone.name_or_path = os.path.abspath(os.path.join(name, subfolder))
    return backbone


def check_weights(name: str, backbone: Any, loading: dict[str, Any]) -> None:
    """UserError where a model's file lacks some of its weights; a pooler that it lacks is taken off."""
    sizes = [
        f"{key} is {tuple(found)} in the file and {tuple(wanted)} in the model"
        for key, found, wanted in sorted(loading["mismatched_keys"])
    ]
    if sizes:
        raise UserError(f"the model {name}: weights of another size than its config.json says: {'; '.join(sizes[:2])}")
    # a model with a head needs all it has
    spare = "pooler." if backbone.base_model is backbone else ()
    missing = {key for key in loading["missing_keys"] if not key.startswith(spare)}
    if missing:
        raise UserError(f"the model {name} lacks weights: {', '.join(sorted(missing)[:5])} ({len(missing)} in all)")
    if loading["missing_keys"]:
        backbone.pooler = None  # not in the file and used by nothing here: not saved with random weights either


def load_tokenizer(source: Source, tokenizer_name: str | None, use_fast: bool) -> Any:
    """The tokenizer, of the model or of another name; lower-casing and a padding token as the model's folder wants."""
    settings = source.settings
    name = tokenizer_name or source.name
    subfolder = "" if tokenizer_name else settings.subfolder
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, subfolder=subfolder, use_fast=use_fast, **source.hub
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of {name} does not load: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {name} has neither a padding token nor an end token to pad with")
        # as generating models do; it is masked, and whoever opens the saved folder can pad
        tokenizer.pad_token = tokenizer.eos_token
    if settings.lower_case and not tokenizer.is_fast:
        raise UserError(f"the folder of {name} asks for lower case, which a slow tokenizer cannot be told")
    if settings.lower_case:
        from tokenizers import normalizers

        own = tokenizer.backend_tokenizer.normalizer
        parts = [normalizers.Lowercase()] + ([] if own is None else [own])
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(parts)
    return tokenizer
