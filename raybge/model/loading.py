"""Opening a model's parts, from a folder or the hub: the transformers backbone with its adapters, and the tokenizer;
and writing what lies beside the weights.
"""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from raybge.model.folder import FolderSettings, write_settings
from raybge.model.lora import Lora, check_adapter_config, load_adapters, merge_adapters
from raybge.util.errors import UserError, first_line

# What transformers and peft raise for weights that are gone or damaged, and for a pickle that holds more than weights.
UNLOADABLE = (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError)


@dataclass(frozen=True)
class ModelLocation:
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


def load_backbone(source: ModelLocation, dtype: torch.dtype, lora: Lora | None = None) -> Any:
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
        return merge_adapters(backbone, source.name, source.adapter_options).to(dtype)
    check_adapter_config(lora, source.name, settings.adapter)
    lora.apply(backbone)
    load_adapters(backbone, source.name, source.adapter_options)
    return backbone


def load_classifier(source: ModelLocation, dtype: torch.dtype) -> Any:
    """The transformers model with its classifying head, every weight from the file. Raises as `load_backbone` does."""
    return _load(source, source.name, "", dtype, transformers.AutoModelForSequenceClassification)


def load_masked_lm(source: ModelLocation) -> tuple[Any, bool]:
    """The transformers model with a masked language model's head, in fp32, and whether that head is a fresh one.

    A folder without one, such as a finished embedding model's, gets random weights for it, and the words' output
    weights are their embeddings. All others are from the file. Raises as `load_backbone` does.
    """
    model, loading = _open(
        source, source.name, source.settings.subfolder, torch.float32, transformers.AutoModelForMaskedLM
    )
    inside = f"{model.base_model_prefix}."
    missing = set(loading["missing_keys"])
    head = {key for key in missing if not key.startswith(inside)}
    check_weights(source.name, model, {**loading, "missing_keys": missing - head})
    if head:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model, bool(head)


def make_masked_lm(source: ModelLocation) -> Any:
    """As `load_masked_lm`, with random weights all over: of the source only its configuration is read."""
    config = _read_config(source, source.name, source.settings.subfolder)
    try:
        return transformers.AutoModelForMaskedLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except ValueError as error:
        raise UserError(
            f"the configuration {source.name} makes no masked language model: {first_line(error)}"
        ) from error


def _load(source: ModelLocation, name: str, subfolder: str, dtype: torch.dtype, auto: Any = transformers.AutoModel) -> Any:
    backbone, loading = _open(source, name, subfolder, dtype, auto)
    check_weights(name, backbone, loading)
    if os.path.isdir(name):
        # what adapters name as their base: it must be found from any current folder
        backbone.name_or_path = os.path.abspath(os.path.join(name, subfolder))
    return backbone


def _open(source: ModelLocation, name: str, subfolder: str, dtype: torch.dtype, auto: Any) -> tuple[Any, dict[str, Any]]:
    """The model and what its file lacked or had in another size."""
    config = _read_config(source, name, subfolder)
    try:
        return auto.from_pretrained(
            name,
            config=config,
            subfolder=subfolder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below
            **source.hub,
        )
    except UNLOADABLE as error:
        raise UserError(f"the model {name} does not load: {first_line(error)}") from error


def _read_config(source: ModelLocation, name: str, subfolder: str) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(
            source.config_name or name, subfolder="" if source.config_name else subfolder, **source.hub
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the model {name} does not load: {first_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"the model {name} has an encoder and a decoder: expected one of the two")
    if hasattr(config, "use_cache"):
        config.use_cache = False  # of use when text is generated only
    return config


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


def load_tokenizer(source: ModelLocation, tokenizer_name: str | None, use_fast: bool) -> Any:
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


def save_tokenizer_and_settings(folder: Path, tokenizer: Any, settings: FolderSettings, dim: int) -> None:
    """Make of a folder that holds a transformers model's weights and configuration a sentence-transformers folder.

    Args:
        settings: with the maximal length in tokens that the folder is to carry.
        dim: width of a vector.
    """
    # a fast tokenizer keeps the last call's truncation and would write it
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = settings.max_length
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    write_settings(folder, settings, dim, {"transformers": transformers.__version__, "pytorch": torch.__version__})
    mode = (folder / "modules.json").stat().st_mode
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)  # safetensors writes files that only their owner can read
