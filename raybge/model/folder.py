"""Model folders: reading and writing their settings for pooling, normalization, prompts and maximal length.

Nothing here imports torch, so a command checks the model's folder before it loads anything.
The layout is that of sentence-transformers
(https://www.sbert.net/docs/package_reference/sentence_transformer/modules.html); a folder without it gets the defaults
of FlagEmbedding: normalized vectors, pooled from an encoder's first token or a decoder's last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raybge.model.setting_types import (
    ADAPTER,
    CONFIG,
    MODULES,
    POOLING,
    SENTENCE_BERT,
    SENTENCE_TRANSFORMERS,
    TOKENIZER,
    check_types,
)
from raybge.model.weight_files import ADAPTER_WEIGHTS, WEIGHTS, check_not_pointer
from raybge.util.errors import UserError
from raybge.util.versions import sentence_transformers_version

POOLINGS = ("cls", "mean", "last_token")

# `model_type` of decoders, for configurations whose `architectures` name the bare model
_DECODERS = frozenset(
    """bloom cohere falcon gemma gemma2 gemma3_text gpt2 gpt_neo gpt_neox gptj granite llama ministral mistral mixtral
    modernbert-decoder olmo olmo2 opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm starcoder2""".split()
)
# names of poolings in sentence-transformers: the current single setting, and the older booleans
_POOLING_OF_MODE = {"cls": "cls", "mean": "mean", "lasttoken": "last_token"}
_OLD_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# tokenizers without a limit store a huge number
_NO_LIMIT = 10**9


@dataclass
class FolderSettings:
    """Settings of a model's folder for turning a text into a vector.

    Args:
        pooling: "cls", "mean" or "last_token".
        normalize: vectors are scaled to length 1.
        prompts: prefixes of texts by name, "query" and "document" among them if the folder has them.
        default_prompt_name: name of the prompt for texts of no particular kind.
        max_length: maximal length of a text in tokens, special tokens included; None: not set in the folder.
        source: "modules.json", or "default" for a folder without it.
        lower_case: texts are lower-cased before tokenization.
        subfolder: place of the weights inside the folder ("0_Transformer" in old sentence-transformers folders).
        base: base model of the low-rank adapters that the folder holds; None: it holds a full model.
        adapter: content of the adapters' adapter_config.json.
    """

    pooling: str = "cls"
    normalize: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    max_length: int | None = None
    source: str = "default"
    lower_case: bool = False
    subfolder: str = ""
    base: str | None = None
    adapter: dict[str, Any] = field(default_factory=dict)


def read_settings(path: str, cache_dir: str | None = None, token: str | bool | None = None) -> FolderSettings:
    """Read the settings of a local model folder, or of a model on the hub (its small JSON files are downloaded).

    Args:
        path: a folder, or a name on the hub.
        cache_dir: folder for models from the hub.
        token: access token for the hub.

    Returns:
        The settings.

    Raises:
        UserError: raybge cannot reproduce the model's vectors: a module other than Transformer, Pooling and Normalize,
            another pooling, a prompt excluded from the pooling, a file that is not JSON.
    """

    def read(name: str, kind: str | None = None) -> Any:
        return read_json(path, name, cache_dir, token, kind)

    settings = FolderSettings()
    modules = read(MODULES)
    if modules is not None:
        _read_modules(path, modules, read, settings)
    elif pooling := next(Path(path).glob(f"*_Pooling/{CONFIG}"), None):
        raise UserError(f"{path}: {MODULES} is missing, which {pooling.parent.name}/{CONFIG} belongs to: copy it again")
    settings.adapter = read(_inside(settings.subfolder, ADAPTER)) or {}
    if settings.adapter:
        settings.base = base_of(f"{path}/{_inside(settings.subfolder, ADAPTER)}", settings.adapter)
    if settings.source == "default":
        config = read_json(settings.base or path, CONFIG, cache_dir, token) or {}
        settings.pooling = "last_token" if _is_decoder(config) else "cls"
    bert = read(_inside(settings.subfolder, SENTENCE_BERT)) or {}
    if bert.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise UserError(
            f"{path}/sentence_bert_config.json: transformer_task is {bert['transformer_task']!r}: expected "
            "feature-extraction, the task of embedding models"
        )
    settings.lower_case = bool(bert.get("do_lower_case"))
    tokenizer = read(_inside(settings.subfolder, TOKENIZER)) or {}
    # older folders have the length in the first file, those of sentence-transformers 6 in the second
    for length in (bert.get("max_seq_length"), tokenizer.get("model_max_length")):
        if length is not None and length < _NO_LIMIT:
            settings.max_length = int(length)
            break
    own = read(SENTENCE_TRANSFORMERS) or {}
    settings.prompts = {name: text for name, text in (own.get("prompts") or {}).items() if text is not None}
    settings.default_prompt_name = own.get("default_prompt_name")
    if settings.default_prompt_name is not None and settings.default_prompt_name not in settings.prompts:
        raise UserError(
            f"{path}/config_sentence_transformers.json: default_prompt_name is {settings.default_prompt_name!r}: "
            f"expected one of its prompts: {', '.join(settings.prompts) or 'none'}"
        )
    return settings


def base_of(file: str, adapter: Mapping[str, Any]) -> str:
    """Return the base model's name from the content of an adapter_config.json."""
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{file}: base_model_name_or_path is missing: expected the base model of the adapters")
    if os.path.isabs(base) and not os.path.isdir(base):
        raise UserError(f"{file}: base_model_name_or_path: the folder {base} does not exist on this machine")
    return base


def _is_decoder(config: Mapping[str, Any]) -> bool:
    """Return True for the config.json of a decoder, whose first token does not attend to the rest of the text."""
    names = [str(name) for name in config.get("architectures") or []]
    return config.get("model_type") in _DECODERS or any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in names)


def _read_modules(path: str, modules: Any, read: Any, settings: FolderSettings) -> None:
    """Read pooling, normalization and subfolder from the content of modules.json into `settings`."""
    try:
        kinds = [_kind(module["type"]) for module in modules]
        folders = [module["path"] or "" for module in modules]
    except (AttributeError, KeyError) as error:
        raise UserError(f"{path}/modules.json: expected a list of modules with a type and a path") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        names = ", ".join(module["type"] for module in modules)
        raise UserError(
            f"{path}/modules.json: expected Transformer, Pooling and optionally Normalize of sentence-transformers, in "
            f"this order; found {names}"
        )
    settings.source = "modules.json"
    settings.normalize = "Normalize" in kinds
    settings.subfolder = folders[0]
    file = _inside(folders[1], "config.json")
    pooling = read(file, POOLING)
    if pooling is None:
        raise UserError(f"{path}/{file} is missing, which modules.json refers to")
    settings.pooling = _pooling_of(f"{path}/{file}", pooling)


def _pooling_of(file: str, config: Mapping[str, Any]) -> str:
    """Return the pooling from the content of the pooling module's config.json."""
    if not any(name.startswith("pooling_mode") or name.endswith("embedding_dimension") for name in config):
        raise UserError(f"{file}: expected a pooling of sentence-transformers, found none of its fields: copy it again")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for switch, mode in _OLD_SWITCHES.items() if config.get(switch)]
        # in sentence-transformers, no switch for it means mean pooling
        modes += ["mean"] * (not modes and "pooling_mode_mean_tokens" not in config)
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLING_OF_MODE:
        raise UserError(f"{file}: pooling: expected one of cls, mean and lasttoken, found {modes}")
    if config.get("include_prompt") is False:
        raise UserError(
            f"{file}: include_prompt: excluding the prompt from the pooling is not supported; expected true"
        )
    return _POOLING_OF_MODE[modes[0]]


def _kind(module_type: str) -> str:
    """Return Transformer for sentence_transformers.models.Transformer and for the longer path of version 6."""
    own = module_type.startswith("sentence_transformers.")
    return module_type.rsplit(".", 1)[-1] if own else module_type


def _inside(folder: str, name: str) -> str:
    """Return the path of a file in a subfolder, which may be the folder itself (empty)."""
    return f"{folder}/{name}" if folder else name


def read_json(
    path: str, name: str, cache_dir: str | None = None, token: str | bool | None = None, kind: str | None = None
) -> Any:
    """Read a settings file of a model.

    Args:
        path: a folder, or a name on the hub.
        name: the file inside of it.
        cache_dir: folder for models from the hub.
        token: access token for the hub.
        kind: kind of file by which the types of its fields are checked; None: its own name.

    Returns:
        The parsed JSON; None if the model has no such file.

    Raises:
        UserError: the file is not JSON, or a setting has another type.
    """
    file = model_file(path, name, cache_dir, token)
    if file is None:
        return None
    check_not_pointer(file)
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    check_types(file, kind or os.path.basename(name), content)
    return content


def model_file(path: str, name: str, cache_dir: str | None = None, token: str | bool | None = None) -> str | None:
    """Return the path of a small file of a local model or of one on the hub; None if the model has no such file."""
    file = os.path.join(path, name) if os.path.isdir(path) else _from_hub(path, name, cache_dir, token)
    return file if file is not None and os.path.isfile(file) else None


def _from_hub(repo: str, name: str, cache_dir: str | None, token: str | bool | None) -> str | None:
    """Download a file from the hub and return its path; None if it does not exist or the hub is unreachable."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return hf_hub_download(repo, name, cache_dir=cache_dir, token=token)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        # an unavailable model is reported when its weights are loaded
        return None


def weights_subfolder(path: str, cache_dir: str | None = None, token: str | bool | None = None) -> str:
    """Return the folder of the weights inside of a model's folder, according to its modules.json; "" for the top."""
    modules = read_json(path, MODULES, cache_dir, token)
    return (modules[0].get("path") or "") if modules else ""


def vector_width(path: str, cache_dir: str | None = None, token: str | bool | None = None) -> int | None:
    """Return the width of a model's vectors from its config.json, None if it is not stated."""
    top = os.path.isfile(os.path.join(path, CONFIG))
    subfolder = "" if top else weights_subfolder(path, cache_dir, token)
    config = read_json(path, _inside(subfolder, CONFIG), cache_dir, token)
    widths = [config.get(name) for name in ("hidden_size", "dim", "d_model", "n_embd")] if config else []
    return next((width for width in widths if isinstance(width, int)), None)


def has_language_head(path: str, cache_dir: str | None = None, token: str | bool | None = None) -> bool:
    """Return True if a model was saved as a masked language model, according to its config.json."""
    config = read_json(path, CONFIG, cache_dir, token) or {}
    return any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in config.get("architectures") or [])


def remove_weights(path: str | Path) -> None:
    """Remove weights and adapters of an earlier model from a folder that another model is written into."""
    shards = ("model-?????-of-?????.safetensors", "pytorch_model-?????-of-?????.bin")
    for pattern in (CONFIG, *WEIGHTS, *shards, ADAPTER, *ADAPTER_WEIGHTS):
        for old in Path(path).glob(pattern):
            old.unlink()


def write_settings(path: str | Path, settings: FolderSettings, dim: int, versions: Mapping[str, str]) -> None:
    """Write the files with which old and new versions of sentence-transformers apply `settings`.

    Module types are the older names, which every version reads; only those pooling switches are written that the oldest
    versions accept, since they reject any other. All files are written at the top of the folder, `settings.subfolder`
    is ignored.

    Args:
        path: the folder.
        settings: settings to write.
        dim: width of a vector.
        versions: versions of libraries, for the record, such as {"transformers": "5.23.0"}.
    """
    folder = Path(path)
    names = ["Transformer", "Pooling"] + ["Normalize"] * settings.normalize
    subfolders = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": subfolder, "type": f"sentence_transformers.models.{name}"}
        for i, (name, subfolder) in enumerate(zip(names, subfolders, strict=False))
    ]
    for subfolder in subfolders[: len(names)]:
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    _write_json(folder / "modules.json", modules)
    mode = {pooling: mode for mode, pooling in _POOLING_OF_MODE.items()}[settings.pooling]
    switches = {
        switch: other == mode
        for switch, other in _OLD_SWITCHES.items()
        if other == mode or other in ("cls", "mean", "max", "mean_sqrt_len_tokens")
    }
    _write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": dim, **switches})
    _write_json(
        folder / "sentence_bert_config.json",
        # lower-casing is part of the saved tokenizer
        {"max_seq_length": settings.max_length, "do_lower_case": False},
    )
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"sentence_transformers": sentence_transformers_version(), **versions},
            "prompts": settings.prompts,
            "default_prompt_name": settings.default_prompt_name,
            "similarity_fn_name": "cosine" if settings.normalize else "dot",
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
