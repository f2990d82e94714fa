"""The models that are mixed, as folders: found, compared, and all of a mixture's folder but its weights.

Of the first model come configuration, tokenizer and code. What sentence-transformers reads (pooling, normalising,
prompts, length) comes from every embedding model whose folder says it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raybge.model.folder import FolderSettings, check_model_folder, read_settings, write_settings
from raybge.util.errors import UserError, first_line

# What transformers opens a model of each type with.
CLASSES = {
    "encoder": "AutoModel",
    "decoder": "AutoModelForCausalLM",
    "reranker": "AutoModelForSequenceClassification",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
}
_SMALL = ["*.json", "*.txt", "*.model", "*.py", "*.jinja"]  # files of a hub's model beside its weights


@dataclass(frozen=True)
class Ingredient:
    """A model as it lies on this machine.

    Args:
        name: as it was given.
        top: its folder; `folder`: where weights, configuration and tokenizer are, in old sentence-transformers folders
            one further down.
        config: its config.json.
        settings: what an embedding model's folder says, defaults for other types.
    """

    name: str
    top: Path
    folder: Path
    config: dict[str, Any]
    settings: FolderSettings

    @classmethod
    def find(cls, name: str, model_type: str, flag: str, cache_dir: str | None = None) -> Ingredient:
        """UserError, naming the flag, for what is no model of that type, is quantised, or consists of adapters."""
        if not os.path.isdir(name):
            check_model_folder(name, flag)
        top = Path(name) if os.path.isdir(name) else _fetched(name, flag, cache_dir)
        if (top / "adapter_config.json").is_file():
            raise UserError(
                f"{flag} {name} holds adapters, which are not weights: make a whole model of them first, with "
                f'raybge.Encoder("{name}").save(FOLDER), or train with --save_merged_lora_model'
            )
        check_model_folder(str(top), flag)
        settings = read_settings(str(top)) if model_type == "encoder" else FolderSettings()
        folder = top / settings.subfolder
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = cls(name, top, folder, config, settings)
        found._check(model_type, flag)
        return found

    def _check(self, model_type: str, flag: str) -> None:
        if self.config.get("quantization_config"):
            raise UserError(f"{flag} {self.name}: quantised weights cannot be mixed; give the model they were made of")
        both = bool(self.config.get("is_encoder_decoder"))
        if both != (model_type == "encoder-decoder"):
            kind = "has an encoder and a decoder" if both else "has not both an encoder and a decoder"
            raise UserError(f"{flag} {self.name} {kind}: --model_type {model_type} cannot be")

    def auto_class(self, model_type: str) -> Any:
        """What transformers opens it with: of language models as rerankers (layer-wise ones too) the language model."""
        import transformers

        kinds = [str(kind) for kind in self.config.get("architectures") or []]
        if model_type == "reranker" and any(kind.endswith("ForCausalLM") for kind in kinds):
            return transformers.AutoModelForCausalLM
        if model_type == "reranker" and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            raise UserError(f"{self.name}: {', '.join(kinds) or 'a model without a head'} does not score pairs")
        return getattr(transformers, CLASSES[model_type])

    def load(self, model_type: str, trust_remote_code: bool = False, **options: Any) -> Any:
        """The transformers model. UserError where the folder lacks weights, which would be random."""
        from raybge.model.loading import UNLOADABLE, check_weights

        auto = self.auto_class(model_type)
        options |= {"trust_remote_code": trust_remote_code, "output_loading_info": True}
        try:
            model, loading = auto.from_pretrained(self.folder, **options)
        except UNLOADABLE as error:
            raise UserError(f"the model {self.name} does not load: {first_line(error)}") from error
        check_weights(self.name, model, loading)
        return model


def _fetched(name: str, flag: str, cache_dir: str | None) -> Path:
    """The hub's model on this machine: its safetensors, or where it has none its pickles."""
    from huggingface_hub import snapshot_download

    try:
        for weights in ("*.safetensors", "*.bin"):
            folder = Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=[*_SMALL, weights]))
            if any(folder.rglob(weights)):
                break
    except Exception as error:  # of several libraries: no such model, no network, no room
        raise UserError(f"{flag} {name}: it is no folder, and cannot be fetched ({first_line(error)})") from error
    return folder


# --- what they have in common -----------------------------------------------------------------------------------------


def check_alike(models: Sequence[Ingredient]) -> None:
    """UserError where the configurations say that two models are of different architectures."""
    first = models[0]
    for name in ("model_type", "num_attention_heads", "n_head", "num_key_value_heads", "hidden_act"):
        for other in models[1:]:
            was, now = first.config.get(name), other.config.get(name)
            if was != now:
                raise UserError(
                    f"{first.name} and {other.name} are of different architectures: {name} is {was} and {now}"
                )


def joined_settings(models: Sequence[Ingredient]) -> FolderSettings:
    """What the folder of a mixture of embedding models says: what theirs say.

    Folders that say nothing have no voice. Prompts of one name are the first model's that has one, the length is the
    longest. UserError where two folders pool or normalise in different ways.
    """
    heard = [model for model in models if model.settings.source != "default"] or list(models)
    first = heard[0]
    for other in heard[1:]:
        for name in ("pooling", "normalize"):
            was, now = getattr(first.settings, name), getattr(other.settings, name)
            if was != now:
                raise UserError(
                    f"{first.name} and {other.name} make vectors in different ways: {name} is {was} and {now} in "
                    "their folders"
                )
    prompts: dict[str, str] = {}
    for model in heard:
        for name, prompt in model.settings.prompts.items():
            prompts[name] = prompts.get(name) or prompt
    lengths = [model.settings.max_length for model in heard if model.settings.max_length]
    return replace(first.settings, prompts=prompts, max_length=max(lengths, default=None))


def differing_prompts(models: Sequence[Ingredient]) -> list[str]:
    """The names of prompts of which two models have different ones."""
    found: dict[str, set[str]] = {}
    for model in models:
        for name, prompt in model.settings.prompts.items():
            if prompt:
                found.setdefault(name, set()).add(prompt)
    return sorted(name for name, texts in found.items() if len(texts) > 1)


def tokenizer_of(model: Ingredient, trust_remote_code: bool = False) -> Any:
    from raybge.model.loading import Source, load_tokenizer

    settings = replace(model.settings, subfolder="")
    return load_tokenizer(Source(str(model.folder), settings, trust_remote_code=trust_remote_code), None, True)


def check_vocabularies(models: Sequence[Ingredient], trust_remote_code: bool = False) -> Any:
    """The first model's tokenizer. UserError, naming a token, where another's has other numbers."""
    first, *others = models
    tokenizer = tokenizer_of(first, trust_remote_code)
    words = tokenizer.get_vocab()
    for other in others:
        theirs = tokenizer_of(other, trust_remote_code).get_vocab()
        if words == theirs:
            continue
        differ = min(token for token in words.keys() | theirs.keys() if words.get(token) != theirs.get(token))
        was, now = (found.get(differ, "missing") for found in (words, theirs))
        raise UserError(
            f"{first.name} and {other.name} have different vocabularies: the token {differ!r} is {was} and {now}"
        )
    return tokenizer


# --- the mixture's folder ---------------------------------------------------------------------------------------------


def write_surroundings(
    folder: Path, first: Ingredient, architecture: str, tokenizer: Any, settings: FolderSettings | None, width: int
) -> None:
    """Write all of a mixture's folder but weights and card.

    Args:
        first: the model whose configuration and code are taken.
        architecture: name of the class that opens the weights.
        settings: of an embedding model; `width` is then that of its vectors.
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
