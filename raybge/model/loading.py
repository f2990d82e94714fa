"""Loading of a model's parts from a folder or the hub: the transformers backbone with its adapters, and the tokenizer.

Also writes the files next to the weights that make a folder one of sentence-transformers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from raybge.compat.torch import COMPILED_PREFIX
from raybge.model.folder import FolderSettings, read_json, read_settings, write_settings
from raybge.model.folder_checks import check_model_folder
from raybge.model.loaded_checks import check_same_tokens, check_vocabulary, check_weights, readable
from raybge.model.lora import Lora, check_adapter_config, load_adapters, merge_adapters, merged_weights
from raybge.model.setting_types import CONFIG
from raybge.util.errors import UserError

# `model_type` of models that number the positions of a text from the padding id + 1 on.
_POSITIONS_FROM_PADDING = frozenset(
    """camembert data2vec-text esm ibert lilt longformer luke markuplm roberta roberta-prelayernorm xlm-roberta
    xlm-roberta-xl xmod""".split()
)


@dataclass(frozen=True)
class ModelLocation:
    """Place of a model, and how to open it.

    Args:
        name: a folder, or a name on the hub.
        settings: settings of the folder (`read_settings`).
        config_name: another configuration than its own.
        cache_dir: folder for models from the hub.
        token: access token for the hub.
        trust_remote_code: run code of the model's folder.
    """

    name: str
    settings: FolderSettings
    config_name: str | None = None
    cache_dir: str | None = None
    token: str | bool | None = None
    trust_remote_code: bool = False

    @property
    def hub(self) -> dict[str, Any]:
        """Keyword arguments of transformers' `from_pretrained`."""
        return {"cache_dir": self.cache_dir, "token": self.token, "trust_remote_code": self.trust_remote_code}

    @property
    def adapter_options(self) -> dict[str, Any]:
        """Keyword arguments with which peft finds the folder's adapters."""
        return {
            "cache_dir": self.cache_dir,
            "token": self.token,
            "subfolder": self.settings.subfolder or None,
        }


def load_backbone(source: ModelLocation, dtype: torch.dtype, lora: Lora | None = None) -> Any:
    """Load the transformers model with every weight from the file; transformers would initialize missing ones silently.

    Args:
        source: the model's place.
        dtype: data type of the weights.
        lora: a plain model gets new adapters, a folder of adapters is prepared for further training. None: a folder of
            adapters is merged into its base model.

    Returns:
        The model.

    Raises:
        UserError: weights are missing, damaged or of another shape.
    """
    settings = source.settings
    if settings.base is None:
        if lora and settings.subfolder and not os.path.isdir(source.name):
            raise UserError(
                f"--use_lora is not supported for {source.name}, whose weights are in the subfolder "
                f"{settings.subfolder}: download the model and use the path of that folder"
            )
        backbone = _load(source, source.name, settings.subfolder, dtype)
        return lora.apply(backbone) if lora else backbone
    # in fp32: a sum in half precision would round the adapters off
    backbone = _load(source, settings.base, "", torch.float32)
    if lora is None:
        return merge_adapters(backbone, source.name, source.adapter_options).to(dtype)
    check_adapter_config(lora, source.name, settings.adapter)
    lora.apply(backbone)
    load_adapters(backbone, source.name, source.adapter_options)
    return backbone


def load_classifier(source: ModelLocation, dtype: torch.dtype) -> Any:
    """Load the transformers model with its classification head; raises like `load_backbone`."""
    return _load(source, source.name, "", dtype, transformers.AutoModelForSequenceClassification)


def load_masked_lm(source: ModelLocation) -> tuple[Any, bool]:
    """Load the transformers model with the head of a masked language model, in fp32; raises like `load_backbone`.

    For a folder without a head, such as that of an embedding model, the head is newly initialized, with output weights
    tied to the word embeddings. All other weights are from the file.

    Args:
        source: the model's place.

    Returns:
        The model, and True if its head is new.
    """
    model, loading = _open(
        source, source.name, source.settings.subfolder, torch.float32, transformers.AutoModelForMaskedLM
    )
    inside = f"{model.base_model_prefix}."
    missing = set(loading["missing_keys"])
    head = {key for key in missing if not key.startswith(inside)}
    check_weights(source.name, model, {**loading, "missing_keys": missing - head}, source.config_name is None)
    if head:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model, bool(head)


def make_masked_lm(source: ModelLocation) -> Any:
    """Make a masked language model with random weights from the configuration of `source`."""
    config = _read_config(source, source.name, source.settings.subfolder)
    with readable(f"the configuration {source.name} is not one of a masked language model"):
        return transformers.AutoModelForMaskedLM.from_config(config, trust_remote_code=source.trust_remote_code)


def make_empty(source: ModelLocation) -> Any:
    """Make the transformers model of `source` without weights, on the meta device."""
    settings = source.settings
    place = (source.name, settings.subfolder) if settings.base is None else (settings.base, "")
    config = _read_config(source, *place)
    with readable(f"the model {source.name} cannot be built from its config.json"), torch.device("meta"):
        return transformers.AutoModel.from_config(config, trust_remote_code=source.trust_remote_code)


def _load(
    source: ModelLocation, name: str, subfolder: str, dtype: torch.dtype, auto: Any = transformers.AutoModel
) -> Any:
    """Load a model with every weight from the file."""
    backbone, loading = _open(source, name, subfolder, dtype, auto)
    check_weights(name, backbone, loading, source.config_name is None)
    if os.path.isdir(name):
        # adapters store it as the name of their base, which has to be valid in any current folder
        backbone.name_or_path = os.path.abspath(os.path.join(name, subfolder))
    return backbone


def _open(
    source: ModelLocation, name: str, subfolder: str, dtype: torch.dtype, auto: Any
) -> tuple[Any, dict[str, Any]]:
    """Return the model, and the names of weights that its file lacks or has in another shape."""
    config = _read_config(source, name, subfolder)
    with readable(f"the model {name} does not load"):
        return auto.from_pretrained(
            name,
            config=config,
            subfolder=subfolder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_weights` names them
            **source.hub,
        )


def _read_config(source: ModelLocation, name: str, subfolder: str) -> Any:
    """Read the configuration; UserError for none, and for an encoder-decoder model."""
    place = source.config_name or name
    with readable(f"the model {place} does not load: config.json"):
        config = transformers.AutoConfig.from_pretrained(
            place, subfolder="" if source.config_name else subfolder, **source.hub
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"the model {name} is an encoder-decoder model: expected an encoder or a decoder")
    if hasattr(config, "use_cache"):
        config.use_cache = False  # needed for generating text only
    _check_padding(place, config.get_text_config())
    if os.path.isdir(place):
        _check_heads(place, "" if source.config_name else subfolder, config)
    return config


def _check_heads(folder: str, subfolder: str, config: Any) -> None:
    """Raise UserError if config.json omits the number of attention heads: no shape of a weight depends on it."""
    name = config.attribute_map.get("num_attention_heads", "num_attention_heads")
    content = read_json(os.path.join(folder, subfolder), CONFIG) or {}
    if hasattr(config, name) and content.keys().isdisjoint((name, "num_attention_heads")):
        raise UserError(f"config.json of {folder}: {name} is missing: expected the number of attention heads")


def _check_padding(name: str, config: Any) -> None:
    """Set a negative padding id, which stands for none, to None; UserError for an id that the model has no row for."""
    pad, rows = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if pad is None or rows is None or 0 <= pad < rows:
        return
    if pad >= rows or config.model_type in _POSITIONS_FROM_PADDING:
        raise UserError(
            f"config.json of {name}: pad_token_id is {pad}: expected the id of the padding token, from 0 to {rows - 1}"
        )
    config.pad_token_id = None


def load_tokenizer(source: ModelLocation, tokenizer_name: str | None, use_fast: bool) -> Any:
    """Load the tokenizer with the folder's lower-casing, and a padding token.

    Args:
        source: the model's place.
        tokenizer_name: another tokenizer than the model's own.
        use_fast: use the tokenizer written in Rust.

    Returns:
        The tokenizer.

    Raises:
        UserError: it does not load, or it has no token to pad with.
    """
    settings = source.settings
    name = tokenizer_name or source.name
    subfolder = "" if tokenizer_name else settings.subfolder
    with readable(f"the tokenizer of {name} does not load"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, subfolder=subfolder, use_fast=use_fast, **source.hub
        )
        tokenizer("text")  # damaged templates of special tokens fail here
        if os.path.isdir(name):
            check_same_tokens(tokenizer, Path(name, subfolder))
    check_vocabulary(tokenizer, name)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer of {name} has neither a padding token nor an end-of-text token to pad with: expected "
                "one of them"
            )
        # as usual for generative models: it is masked, and other libraries can pad with the saved tokenizer
        tokenizer.pad_token = tokenizer.eos_token
    if settings.lower_case and not tokenizer.is_fast:
        raise UserError(
            f"the folder of {name} requires lower-casing, which slow tokenizers do not support: use the fast one"
        )
    if settings.lower_case:
        from tokenizers import normalizers

        own = tokenizer.backend_tokenizer.normalizer
        parts = [normalizers.Lowercase()] + ([] if own is None else [own])
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(parts)
    return tokenizer


def backbone_weights(state_dict: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Return the backbone's part of the state_dict of a training module.

    Args:
        state_dict: weights of a module with an `EmbeddingModel` as `embedding`, such as `ContrastiveModel`; names may
            have the prefixes of torch.compile.
        expected: names of the backbone's weights.

    Returns:
        Weights by their names in the backbone.

    Raises:
        ValueError: other names than expected.
    """
    weights = {}
    for name, tensor in state_dict.items():
        _, prefix, rest = name.replace(COMPILED_PREFIX, "").partition("embedding.backbone.")
        if prefix:
            weights[rest] = tensor
    if weights.keys() != set(expected):
        differ = sorted(weights.keys() ^ set(expected))
        raise ValueError(f"state_dict does not match this model: {', '.join(differ[:5])} ({len(differ)} in total)")
    return weights


def save_merged(
    backbone: Any, folder: Path, state_dict: Mapping[str, Tensor] | None, trust_remote_code: bool = False
) -> None:
    """Write the plain model that a model with adapters is equivalent to, without instantiating it.

    Args:
        backbone: a model with adapters.
        folder: the folder.
        state_dict: its weights if those in memory are sharded or renamed; None: those in memory.
        trust_remote_code: run code of the model's folder.
    """
    weights = merged_weights(backbone, backbone.state_dict() if state_dict is None else state_dict)
    with torch.device("meta"):
        shell = transformers.AutoModel.from_config(
            copy.deepcopy(backbone.config), dtype=backbone.dtype, trust_remote_code=trust_remote_code
        )
    shell.save_pretrained(folder, state_dict=weights)


def save_tokenizer_and_settings(folder: Path, tokenizer: Any, settings: FolderSettings, dim: int) -> None:
    """Turn a folder with the weights and configuration of a transformers model into one of sentence-transformers.

    Args:
        folder: the folder.
        tokenizer: the model's tokenizer.
        settings: settings to write, among them the maximal length in tokens.
        dim: width of a vector.
    """
    # a fast tokenizer remembers the last call's truncation and would write it
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


def copy_weights(backbone: Any, path: str, trains_adapters: bool, trust_remote_code: bool) -> None:
    """Copy the weights of a folder of `Encoder.save` into a model in memory, in place; adapters into adapters.

    Args:
        backbone: the model in memory.
        path: the folder.
        trains_adapters: the model in memory has adapters.
        trust_remote_code: run code of the folder.

    Raises:
        UserError: names or shapes of the weights differ from this model's.
    """
    check_model_folder(path, "the checkpoint")
    settings = read_settings(path)
    if (settings.base is not None) != trains_adapters:
        kinds = ["a full model", "adapters"]
        saved, expected = kinds if settings.base is None else reversed(kinds)
        raise UserError(f"the checkpoint {path} holds {saved}, expected {expected}: use --use_lora as in that run")
    if trains_adapters:
        load_adapters(backbone, path, {})
        return
    # through transformers: some models name their weights differently in a file and in memory
    source = ModelLocation(path, settings, trust_remote_code=trust_remote_code)
    weights = load_backbone(source, backbone.dtype).state_dict()
    try:
        backbone.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(f"the checkpoint {path} does not match this model: {error}") from error
