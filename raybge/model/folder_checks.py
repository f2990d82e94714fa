"""Checks of a model's folder before anything is loaded: files that are missing, cut off or of another kind of model.

Nothing here imports torch, except for code of the model's own folder.
"""

from __future__ import annotations

import os
from typing import Any

from raybge.model.folder import base_of, read_json, read_settings, weights_subfolder
from raybge.model.lora import require_peft
from raybge.model.setting_types import ADAPTER, CONFIG
from raybge.model.tokenizer_files import check_tokenizer_files
from raybge.model.weight_files import ADAPTER_WEIGHTS, WEIGHTS, check_weight_files
from raybge.util.errors import UserError


def check_model_folder(path: str, flag: str, tokenizer_name: str | None = None) -> None:
    """Raise UserError if `path` is a folder without a whole embedding model and its tokenizer, or no folder.

    The table of contents of each file of weights is read, no tensor. A hub name (`name` or `owner/name`) that is no
    local path passes; the hub is not asked.

    Args:
        path: a folder, or a name on the hub.
        flag: flag for the message, such as "--model_name_or_path".
        tokenizer_name: another tokenizer than the model's own, which the folder then does not need.
    """
    check_model_files(path, flag, tokenizer_name)
    if os.path.isdir(path):
        read_settings(path)


def check_model_files(path: str, flag: str, tokenizer_name: str | None = None) -> None:
    """Check a model of any kind like `check_model_folder`, without the settings of an embedding model."""
    if tokenizer_name is not None and _is_folder(tokenizer_name, "--tokenizer_name"):
        _checked(f"--tokenizer_name {tokenizer_name}", check_tokenizer_files, tokenizer_name)
    if not _is_folder(path, flag):
        return
    folder = os.path.join(path, weights_subfolder(path))

    def has(*names: str) -> bool:
        return any(os.path.isfile(os.path.join(folder, name)) for name in names)

    subject, config = f"{flag} {path}", {}
    if has(ADAPTER):
        if has(*WEIGHTS):
            raise UserError(f"{subject}: both a model's weights and adapters ({ADAPTER}) are here: remove one of them")
        _checked(subject, check_weight_files, folder, ADAPTER_WEIGHTS)
        require_peft(f"{subject}, which holds adapters,")
        base = base_of(os.path.join(folder, ADAPTER), read_json(folder, ADAPTER))
        if os.path.isdir(base):
            _checked(subject, check_weight_files, base)
    else:
        if not has(CONFIG):
            raise UserError(f"{subject}: no model here, {CONFIG} is missing")
        config = read_json(folder, CONFIG)
        _checked(subject, check_weight_files, folder)
    if tokenizer_name is None:
        _checked(subject, check_tokenizer_files, folder, config.get("vocab_size"))


def _is_folder(path: str, flag: str) -> bool:
    """Return whether a path is a folder; UserError for a file, and for a path that is no name on the hub."""
    if os.path.isdir(path):
        return True
    if os.path.exists(path):
        raise UserError(f"{flag} {path}: expected a model's folder, found a file")
    if path.startswith((".", "~", "/", os.sep)) or path.count("/") > 1 or not path.strip():
        raise UserError(f"{flag} {path}: no such folder")
    return False


def _checked(subject: str, check: Any, *arguments: Any) -> None:
    """Run a check of files whose message gets the flag in front."""
    try:
        check(*arguments)
    except UserError as error:
        raise UserError(f"{subject}: {error}") from error


def check_reranker(name: str, flag: str, cache_dir: str | None = None, trust_remote_code: bool = False) -> None:
    """Raise UserError if `name` is no cross-encoder, that is, a sequence classifier with one output.

    Only its config.json is read. A hub name passes if the hub is unreachable; loading then fails.

    Args:
        name: a folder, or a name on the hub.
        flag: flag for the message, such as "--cross_encoder".
        cache_dir: folder for models from the hub.
        trust_remote_code: code in the model's folder may run.
    """
    expected = "expected a cross-encoder: a sequence classifier with one output, such as BAAI/bge-reranker-v2-m3"
    if os.path.isfile(os.path.join(name, ADAPTER)):
        raise UserError(f"{flag} {name}: adapters alone are not supported, merge them into their base; {expected}")
    check_model_files(name, flag)
    config = read_json(name, CONFIG, cache_dir)
    if config is None and not os.path.isdir(name):
        return
    config = config or {}
    kinds = [str(kind) for kind in config.get("architectures") or []]
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        raise UserError(f"{flag} {name}: language models as rerankers ({kinds[0]}) are not supported; {expected}")
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        architecture = ", ".join(kinds) or "a model without a head"
        raise UserError(f"{flag} {name}: {architecture} does not score pairs; {expected}")
    # transformers omits the labels if there are two
    outputs = len(config.get("id2label") or ()) or config.get("num_labels", 2)
    if outputs != 1:
        raise UserError(f"{flag} {name}: this classifier has {outputs} outputs; {expected}")
    code = (config.get("auto_map") or {}).get("AutoModelForSequenceClassification")
    if code and not trust_remote_code:
        from transformers import CONFIG_MAPPING  # imports torch

        if config.get("model_type") not in CONFIG_MAPPING:
            raise UserError(f"{flag} {name}: this model runs its own code ({code}); allow it by --trust_remote_code")
