"""Opening of a model in the chosen backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from raybge.model.backends.choice import BackendChoice
from raybge.model.backends.exported_models import find_or_export
from raybge.model.backends.sessions import ExportedBackbone, open_session
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.model.loading import ModelLocation
    from raybge.model.lora import Lora


def open_backbone(
    source: ModelLocation,
    choice: BackendChoice,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    lora: Lora | None,
    tokenizer_name: str | None,
    use_fast_tokenizer: bool,
    export_dir: str | None,
) -> nn.Module:
    """Load a model in torch, or open its export in another backend, which is made first if there is none.

    Args:
        source: the model's place.
        choice: backend and precision.
        dtype: type of the weights in torch.
        devices: devices of the model: one CPU, except in torch.
        lora: adapters to train; None for an exported model.
        tokenizer_name: another tokenizer than the model's own, for the sample texts of an export.
        use_fast_tokenizer: use the tokenizer written in Rust.
        export_dir: folder of exported models; None: in the user's cache folder.

    Returns:
        The backbone; an exported one has as many threads as torch has.

    Raises:
        UserError: no such model, or for an exported one another device than one CPU, adapters to train, or a model that
            cannot be exported.
    """
    from raybge.model.loading import load_backbone, make_empty

    if not choice.exported:
        return load_backbone(source, dtype, lora)
    if [device.type for device in devices] != ["cpu"]:
        raise UserError(
            f"encode_backend {choice.backend} runs on one CPU, found devices {[*map(str, devices)]}: omit one of both"
        )
    if lora:
        raise UserError(f"encode_backend {choice.backend}: an exported model is not trained; omit lora")
    keywords = {
        **source.hub,
        "model_name_or_path": source.name,
        "config_name": source.config_name,
        "tokenizer_name": tokenizer_name,
        "use_fast_tokenizer": use_fast_tokenizer,
        "export_dir": export_dir,
    }
    exported = find_or_export(keywords, choice)
    run = open_session(exported.local_file(), choice.backend, choice.precision or "fp32", torch.get_num_threads())
    return ExportedBackbone(run, make_empty(source))
