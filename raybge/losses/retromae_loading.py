"""Loading and saving of models in pre-training: from a folder, the hub or a configuration; as encoder or checkpoint.

A checkpoint is an encoder's folder, which opens like any other model, plus one file with all other weights: the
language model's head and the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raybge.compat.torch import COMPILED_PREFIX
from raybge.data.masking import check_mask_token
from raybge.losses.retromae import RetroMAE
from raybge.model.folder import FolderSettings, read_settings, remove_weights
from raybge.model.folder_checks import check_model_folder
from raybge.model.loaded_checks import check_token_ids
from raybge.model.loading import (
    ModelLocation,
    backbone_weights,
    load_backbone,
    load_masked_lm,
    load_tokenizer,
    make_masked_lm,
    save_tokenizer_and_settings,
)
from raybge.util.errors import UserError, first_line

PRETRAINING_FILE = "pretraining.safetensors"
_ENCODER = "embedding.backbone."  # prefix of the encoder's weight names in a RetroMAE


class PretrainingModel(NamedTuple):
    """A model ready for pre-training; `fresh_head` if the language model's head is newly initialized."""

    model: RetroMAE
    tokenizer: Any
    fresh_head: bool


def load_pretraining_model(
    model_name_or_path: str | None = None,
    config_name: str | None = None,
    tokenizer_name: str | None = None,
    method: str = "retromae",
    bow_loss_weight: float = 0.1,
    pad_to_multiple_of: int | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    use_fast_tokenizer: bool = True,
) -> PretrainingModel:
    """Load a model for pre-training, in fp32, with a new decoder. New weights depend on torch's seed.

    Args:
        model_name_or_path: a masked language model or an embedding model; None: from scratch.
        config_name: another configuration than the model's own; required from scratch.
        tokenizer_name: another tokenizer than the model's own; required from scratch.
        method: "retromae" or "dupmae".
        bow_loss_weight: weight of the bag-of-words loss.
        pad_to_multiple_of: round the length of a chunk of texts up to a multiple of this.
        cache_dir: folder for models from the hub.
        token: access token for the hub.
        trust_remote_code: run code of the model's folder.
        use_fast_tokenizer: use the tokenizer written in Rust.

    Returns:
        The model, its tokenizer, and whether the language model's head is new.

    Raises:
        UserError: no model at this place, no masked language model, adapters; a tokenizer without a mask token or with
            more words than the model.
    """
    name = model_name_or_path or config_name
    if name is None or (model_name_or_path is None and tokenizer_name is None):
        raise UserError("missing: --model_name_or_path, or --config_name and --tokenizer_name to start from scratch")
    hub = cache_dir, token, trust_remote_code
    if model_name_or_path is None:
        source = ModelLocation(name, FolderSettings(), None, *hub)
    else:
        check_model_folder(name, "--model_name_or_path", tokenizer_name)
        source = ModelLocation(name, read_settings(name, cache_dir, token), config_name, *hub)
        if source.settings.base is not None:
            raise UserError(f"--model_name_or_path {name}: adapters cannot be pre-trained; expected a full model")
    tokenizer = load_tokenizer(source, tokenizer_name, use_fast_tokenizer)
    check_mask_token(tokenizer, tokenizer_name or name)
    masked_lm, fresh = (make_masked_lm(source), True) if model_name_or_path is None else load_masked_lm(source)
    check_token_ids(tokenizer, tokenizer_name or name, masked_lm, name)
    return PretrainingModel(RetroMAE(masked_lm, method, bow_loss_weight, pad_to_multiple_of), tokenizer, fresh)


def save_encoder(
    model: RetroMAE, tokenizer: Any, path: str | Path, max_length: int, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write the encoder alone as a sentence-transformers folder: CLS pooling, normalized, no prompts.

    Args:
        model: the model in training.
        tokenizer: its tokenizer.
        path: the folder; an existing model in it is replaced.
        max_length: maximal length of a text in tokens, stored in the folder.
        state_dict: weights to write, by their names in `model`; needed if those in memory are sharded or renamed by
            torch.compile. None: those in memory.
    """
    folder = Path(path)
    remove_weights(folder)
    (folder / PRETRAINING_FILE).unlink(missing_ok=True)
    backbone: Any = model.embedding.backbone
    weights = None if state_dict is None else backbone_weights(state_dict, backbone.state_dict().keys())
    backbone.save_pretrained(folder, state_dict=weights)
    save_tokenizer_and_settings(folder, tokenizer, FolderSettings(max_length=max_length), model.embedding.dim)


def save_pretraining_checkpoint(
    model: RetroMAE, tokenizer: Any, path: str | Path, max_length: int, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write the encoder like `save_encoder`, and head and decoder into PRETRAINING_FILE."""
    save_encoder(model, tokenizer, path, max_length, state_dict)
    weights = model.state_dict() if state_dict is None else _plain(state_dict)
    rest = {name: weights[name].detach().cpu().contiguous() for name in _rest(model)}
    file = Path(path) / PRETRAINING_FILE
    save_file(rest, file, {"format": "pt"})
    file.chmod((Path(path) / "modules.json").stat().st_mode)  # safetensors writes files that only the owner can read


def load_pretraining_checkpoint(model: RetroMAE, path: str | Path, trust_remote_code: bool = False) -> None:
    """Copy the weights of a folder of `save_pretraining_checkpoint` into the model in memory, in place.

    Args:
        model: the model to fill.
        path: the checkpoint's folder.
        trust_remote_code: run code of the folder.

    Raises:
        UserError: names or shapes of the weights differ from this model's.
    """
    check_model_folder(str(path), "the checkpoint")
    source = ModelLocation(str(path), read_settings(str(path)), trust_remote_code=trust_remote_code)
    try:
        weights = load_file(Path(path) / PRETRAINING_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the checkpoint {path}: {PRETRAINING_FILE} does not load: {first_line(error)}") from error
    backbone: Any = model.embedding.backbone
    # through transformers: some models name their weights differently in a file and in memory
    weights |= {_ENCODER + name: w for name, w in load_backbone(source, backbone.dtype).state_dict().items()}
    own = {_ENCODER + name: w for name, w in backbone.state_dict().items()} | _rest(model)
    shapes, expected = ({name: tuple(w.shape) for name, w in each.items()} for each in (weights, own))
    if shapes != expected:
        differ = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise UserError(
            f"the checkpoint {path} does not match this model: {', '.join(differ[:3])} ({len(differ)} in total); "
            "expected a checkpoint of the same run"
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])


@dataclass(frozen=True)
class PretrainedEncoder:
    """A model in pre-training with the methods that a run saves and resumes it by; `max_length` in tokens."""

    model: RetroMAE
    tokenizer: Any
    max_length: int

    def save(self, path: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write a checkpoint to resume from."""
        save_pretraining_checkpoint(self.model, self.tokenizer, path, self.max_length, state_dict)

    def save_encoder(self, path: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write the encoder alone."""
        save_encoder(self.model, self.tokenizer, path, self.max_length, state_dict)

    def load_weights(self, path: str | Path) -> None:
        """Read a checkpoint of `save`."""
        load_pretraining_checkpoint(self.model, path)


def _rest(model: RetroMAE) -> dict[str, Tensor]:
    """Return the weights outside the encoder. A weight that the head shares with the encoder belongs to the encoder."""
    return {name: weight for name, weight in model.named_parameters() if not name.startswith(_ENCODER)}


def _plain(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under their names without the prefix that torch.compile inserts."""
    return {name.replace(COMPILED_PREFIX, ""): weight for name, weight in state_dict.items()}
