"""Source models of a merge: located, checked for compatibility, and the files of a merged model other than weights.

Configuration, tokenizer and code of a merged model are the first source's. The sentence-transformers settings (pooling,
normalization, prompts, length) are combined from every embedding model whose folder states them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raybge.model.folder import FolderSettings, read_json, read_settings, write_settings
from raybge.model.folder_checks import check_model_files
from raybge.model.setting_types import CONFIG
from raybge.util.errors import UserError, first_line

# transformers' auto class for each model type.
CLASSES = {
    "encoder": "AutoModel",
    "decoder": "AutoModelForCausalLM",
    "reranker": "AutoModelForSequenceClassification",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
}
_METADATA_FILES = ["*.json", "*.txt", "*.model", "*.py", "*.jinja"]  # of a hub model, next to its weights


@dataclass(frozen=True)
class SourceModel:
    """One source model of a merge, as files on this machine.

    Args:
        name: as the user spelled it.
        folder: folder of the weights, the configuration and the tokenizer; in old sentence-transformers models, a
            subfolder of the model's folder.
        config: contents of config.json.
        settings: settings of an embedding model's folder; the defaults for other model types.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    settings: FolderSettings

    @classmethod
    def open(cls, name: str, model_type: str, flag: str, cache_dir: str | None = None) -> SourceModel:
        """Locate a model, downloading it from the hub if it is not a local folder, and read its configuration.

        Args:
            name: folder or hub name.
            model_type: a key of CLASSES.
            flag: name of the flag that `name` comes from, with its dashes.
            cache_dir: cache of the hub's models.

        Returns:
            The model.

        Raises:
            UserError: there is no such model, it has another type, it is quantized, or it consists of adapters.
        """
        if not os.path.isdir(name):
            check_model_files(name, flag)
        top = Path(name) if os.path.isdir(name) else _download(name, flag, cache_dir)
        if (top / "adapter_config.json").is_file():
            raise UserError(
                f"{flag} {name} contains adapters, which cannot be merged: write a full model first, with "
                f'raybge.Encoder("{name}").save(FOLDER), or train with --save_merged_lora_model'
            )
        check_model_files(str(top), flag)
        settings = read_settings(str(top)) if model_type == "encoder" else FolderSettings()
        folder = top / settings.subfolder
        config = read_json(str(folder), CONFIG)
        if config is None:
            raise UserError(f"{flag} {name}: no model here, {folder / CONFIG} is missing")
        model = cls(name, folder, config, settings)
        model.check_type(model_type, flag)
        return model

    def check_type(self, model_type: str, flag: str) -> None:
        """Raise a UserError naming `flag` if the model cannot be merged as `model_type`."""
        if self.config.get("quantization_config"):
            raise UserError(
                f"{flag} {self.name}: quantized weights cannot be merged; use the model before its quantization"
            )
        seq2seq = bool(self.config.get("is_encoder_decoder"))
        if seq2seq != (model_type == "encoder-decoder"):
            kind = "is an encoder-decoder model" if seq2seq else "is not an encoder-decoder model"
            raise UserError(f"{flag} {self.name} {kind}, which contradicts --model_type {model_type}")

    def auto_class(self, model_type: str) -> Any:
        """Return transformers' auto class that loads the model.

        Rerankers built on a language model, layer-wise ones included, are loaded as language models.
        """
        import transformers

        architectures = [str(name) for name in self.config.get("architectures") or []]
        if model_type == "reranker" and any(name.endswith("ForCausalLM") for name in architectures):
            return transformers.AutoModelForCausalLM
        if model_type == "reranker" and not any(name.endswith("ForSequenceClassification") for name in architectures):
            raise UserError(
                f"{self.name} is not a reranker: its architecture is {', '.join(architectures) or 'not stated'}, "
                "expected a sequence classifier or a language model"
            )
        return getattr(transformers, CLASSES[model_type])

    def load(self, model_type: str, trust_remote_code: bool = False, **options: Any) -> Any:
        """Load the transformers model; `options` go to `from_pretrained`.

        Raises UserError if the folder lacks weights, which transformers would initialize at random.
        """
        from raybge.model.loaded_checks import check_weights, readable

        auto = self.auto_class(model_type)
        options |= {"trust_remote_code": trust_remote_code, "output_loading_info": True}
        with readable(f"the model {self.name} cannot be loaded"):
            model, loading = auto.from_pretrained(self.folder, **options)
        check_weights(self.name, model, loading)
        return model


def _download(name: str, flag: str, cache_dir: str | None) -> Path:
    """Download a hub model's safetensors, or its pickles if it has no safetensors."""
    from huggingface_hub import snapshot_download

    try:
        for weights in ("*.safetensors", "*.bin"):
            folder = Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=[*_METADATA_FILES, weights]))
            if any(folder.rglob(weights)):
                break
    except Exception as error:  # from several libraries: no such model, no network, a full disk
        raise UserError(
            f"{flag} {name} is not a folder and cannot be downloaded from the hub ({first_line(error)})"
        ) from error
    return folder


# --- compatibility ----------------------------------------------------------------------------------------------------


def check_architectures(models: Sequence[SourceModel]) -> None:
    """Raise UserError if the configurations of two models state different architectures."""
    first = models[0]
    for key in ("model_type", "num_attention_heads", "n_head", "num_key_value_heads", "hidden_act"):
        for other in models[1:]:
            expected, actual = first.config.get(key), other.config.get(key)
            if expected != actual:
                raise UserError(
                    f"{first.name} and {other.name} have different architectures: {key} is {expected} and {actual}"
                )


def combine_settings(models: Sequence[SourceModel]) -> FolderSettings:
    """Combine the folder settings of embedding models into those of the merged model.

    Folders without settings are ignored. A prompt is taken from the first model that has one of its name; the length is
    the longest.

    Args:
        models: source models, at least one.

    Returns:
        Settings of the merged model's folder.

    Raises:
        UserError: two folders state different pooling or normalization.
    """
    stating = [model for model in models if model.settings.source != "default"] or list(models)
    first = stating[0]
    for other in stating[1:]:
        for name in ("pooling", "normalize"):
            expected, actual = getattr(first.settings, name), getattr(other.settings, name)
            if expected != actual:
                raise UserError(
                    f"{first.name} and {other.name} compute embeddings differently: {name} is {expected} and {actual} "
                    "in their folders"
                )
    prompts: dict[str, str] = {}
    for model in stating:
        for name, prompt in model.settings.prompts.items():
            prompts[name] = prompts.get(name) or prompt
    lengths = [model.settings.max_length for model in stating if model.settings.max_length]
    return replace(first.settings, prompts=prompts, max_length=max(lengths, default=None))


def conflicting_prompts(models: Sequence[SourceModel]) -> list[str]:
    """Return the names of prompts that differ between models."""
    texts_by_name: dict[str, set[str]] = {}
    for model in models:
        for name, prompt in model.settings.prompts.items():
            if prompt:
                texts_by_name.setdefault(name, set()).add(prompt)
    return sorted(name for name, texts in texts_by_name.items() if len(texts) > 1)


def load_source_tokenizer(model: SourceModel, trust_remote_code: bool = False) -> Any:
    """Load a source model's tokenizer."""
    from raybge.model.loading import ModelLocation, load_tokenizer

    settings = replace(model.settings, subfolder="")
    return load_tokenizer(ModelLocation(str(model.folder), settings, trust_remote_code=trust_remote_code), None, True)


def load_common_tokenizer(models: Sequence[SourceModel], trust_remote_code: bool = False) -> Any:
    """Return the first model's tokenizer; raise UserError, naming a token, if another vocabulary differs from it."""
    first, *others = models
    tokenizer = load_source_tokenizer(first, trust_remote_code)
    vocabulary = tokenizer.get_vocab()
    for other in others:
        other_vocabulary = load_source_tokenizer(other, trust_remote_code).get_vocab()
        if vocabulary == other_vocabulary:
            continue
        tokens = vocabulary.keys() | other_vocabulary.keys()
        token = min(each for each in tokens if vocabulary.get(each) != other_vocabulary.get(each))
        ids = [each.get(token, "missing") for each in (vocabulary, other_vocabulary)]
        raise UserError(
            f"{first.name} and {other.name} have different vocabularies: the id of token {token!r} is {ids[0]} and "
            f"{ids[1]}"
        )
    return tokenizer


# --- the merged model's folder ----------------------------------------------------------------------------------------


def write_model_files(
    folder: Path, first: SourceModel, architecture: str, tokenizer: Any, settings: FolderSettings | None, width: int
) -> None:
    """Write a merged model's folder except for its weights and its card.

    Args:
        folder: an existing folder.
        first: source model that the configuration and the code are taken from.
        architecture: name of the class that loads the weights.
        tokenizer: tokenizer of the merged model.
        settings: settings of an embedding model; None for other model types.
        width: dimension of the embeddings if there are settings.
    """
    config = {**first.config, "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in [*first.folder.glob("*.py"), first.folder / "generation_config.json"]:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    if settings:
        tokenizer.model_max_length = settings.max_length or tokenizer.model_max_length
    tokenizer.save_pretrained(folder)
    if settings:
        import torch
        import transformers

        versions = {"transformers": transformers.__version__, "pytorch": torch.__version__}
        write_settings(folder, settings, width, versions)
