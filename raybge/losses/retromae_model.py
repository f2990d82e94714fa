"""A model for pre-training: opened from a folder, the hub or a configuration, and written as an encoder or whole.

A checkpoint is an encoder's folder, which opens like any other, with everything else beside it in one file: the
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

from raybge.data.masking import check_mask_token
from raybge.losses.retromae import RetroMAE
from raybge.model.folder import FolderSettings, check_model_folder, read_settings, remove_weights
from raybge.model.loading import (
    ModelLocation,
    load_backbone,
    load_masked_lm,
    load_tokenizer,
    make_masked_lm,
    save_tokenizer_and_settings,
)
from raybge.util.errors import UserError, first_line

PRETRAINING_FILE = "pretraining.safetensors"
_ENCODER = "embedding.backbone."  # before the names of the encoder's weights in a RetroMAE


class PretrainingModel(NamedTuple):
    """`fresh_head`: the language model's head is new: the model came without one, or all of it is new."""

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
    """Open a model for pre-training, in fp32, with a new decoder. What is new follows from torch's seed.

    Args:
        model_name_or_path: a masked language model or an embedding model; None: from scratch.
        config_name, tokenizer_name: instead of the model's own; without a model both must be given.
        method, bow_loss_weight, pad_to_multiple_of: as in RetroMAE.
        cache_dir, token, trust_remote_code: as transformers takes them.

    Raises:
        UserError: no model there, no masked language model, adapters; a tokenizer without a mask token or with more
            words than the model.
    """
    name = model_name_or_path or config_name
    if name is None or (model_name_or_path is None and tokenizer_name is None):
        raise UserError("expected --model_name_or_path, or --config_name and --tokenizer_name to start from scratch")
    hub = cache_dir, token, trust_remote_code
    if model_name_or_path is None:
        source = ModelLocation(name, FolderSettings(), None, *hub)
    else:
        check_model_folder(name, "--model_name_or_path")
        source = ModelLocation(name, read_settings(name, cache_dir, token), config_name, *hub)
        if source.settings.base is not None:
            raise UserError(f"--model_name_or_path {name}: adapters are not pre-trained, expected a whole model")
    tokenizer = load_tokenizer(source, tokenizer_name, use_fast_tokenizer)
    check_mask_token(tokenizer, tokenizer_name or name)
    masked_lm, fresh = (make_masked_lm(source), True) if model_name_or_path is None else load_masked_lm(source)
    most, room = max(tokenizer.get_vocab().values()), masked_lm.get_input_embeddings().num_embeddings
    if most >= room:
        raise UserError(
            f"the tokenizer of {tokenizer_name or name} has tokens up to number {most}, "
            f"the model {name} knows those below {room}"
        )
    return PretrainingModel(RetroMAE(masked_lm, method, bow_loss_weight, pad_to_multiple_of), tokenizer, fresh)


def save_encoder(
    model: RetroMAE, tokenizer: Any, path: str | Path, max_length: int, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write the encoder alone as a sentence-transformers folder: CLS pooling, normalised, no prompts.

    Args:
        path: the folder; a model that is there is replaced.
        max_length: in tokens, which the folder carries.
        state_dict: the weights to write, by their names in `model`, where those in memory are not whole or not under
            their names (sharded, compiled). None: those in memory.
    """
    folder = Path(path)
    remove_weights(folder)
    (folder / PRETRAINING_FILE).unlink(missing_ok=True)
    backbone: Any = model.embedding.backbone
    own = None
    if state_dict is not None:
        own = {name.removeprefix(_ENCODER): w for name, w in _plain(state_dict).items() if name.startswith(_ENCODER)}
        if own.keys() != backbone.state_dict().keys():
            raise ValueError(f"not the weights of this model: {', '.join(sorted(state_dict)[:5])}")
    backbone.save_pretrained(folder, state_dict=own)
    save_tokenizer_and_settings(folder, tokenizer, FolderSettings(max_length=max_length), model.embedding.dim)


def save_checkpoint(
    model: RetroMAE, tokenizer: Any, path: str | Path, max_length: int, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write the encoder as `save_encoder` does, and head and decoder beside it."""
    save_encoder(model, tokenizer, path, max_length, state_dict)
    given = model.state_dict() if state_dict is None else _plain(state_dict)
    rest = {name: given[name].detach().cpu().contiguous() for name in _rest(model)}
    file = Path(path) / PRETRAINING_FILE
    save_file(rest, file, {"format": "pt"})
    file.chmod((Path(path) / "modules.json").stat().st_mode)  # safetensors writes what only the owner can read


def load_checkpoint(model: RetroMAE, path: str | Path, trust_remote_code: bool = False) -> None:
    """Copy the weights of a folder that `save_checkpoint` wrote into the model in memory, in place.

    Raises UserError for a folder whose weights are not exactly this model's.
    """
    check_model_folder(str(path), "the checkpoint")
    source = ModelLocation(str(path), read_settings(str(path)), trust_remote_code=trust_remote_code)
    try:
        found = load_file(Path(path) / PRETRAINING_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the checkpoint {path}: {PRETRAINING_FILE} does not load: {first_line(error)}") from error
    backbone: Any = model.embedding.backbone
    # through transformers: some models have other names for their weights in a file than in memory
    found |= {_ENCODER + name: w for name, w in load_backbone(source, backbone.dtype).state_dict().items()}
    own = {_ENCODER + name: w for name, w in backbone.state_dict().items()} | _rest(model)
    sizes, wanted = ({name: tuple(w.shape) for name, w in each.items()} for each in (found, own))
    if sizes != wanted:
        differ = sorted(name for name in sizes.keys() | wanted.keys() if sizes.get(name) != wanted.get(name))
        raise UserError(f"the checkpoint {path} holds another model than this: {', '.join(differ[:3])}")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(found[name])


@dataclass(frozen=True)
class PretrainedEncoder:
    """A model in training, as a run saves and continues it. `max_length`: in tokens."""

    model: RetroMAE
    tokenizer: Any
    max_length: int

    def save(self, path: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """All of it, to continue from."""
        save_checkpoint(self.model, self.tokenizer, path, self.max_length, state_dict)

    def save_encoder(self, path: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """The encoder alone."""
        save_encoder(self.model, self.tokenizer, path, self.max_length, state_dict)

    def load_weights(self, path: str | Path) -> None:
        """What `save` wrote."""
        load_checkpoint(self.model, path)


def _rest(model: RetroMAE) -> dict[str, Tensor]:
    """The weights that are not the encoder's. What the head shares with it is the encoder's, and comes first."""
    return {name: weight for name, weight in model.named_parameters() if not name.startswith(_ENCODER)}


def _plain(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names without what torch.compile puts in between."""
    return {name.replace("_orig_mod.", ""): weight for name, weight in state_dict.items()}
