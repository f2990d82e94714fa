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

from raybge.model.lora import require_peft
from raybge.util.errors import UserError
from raybge.util.versions import sentence_transformers_version

POOLINGS = ("cls", "mean", "last_token")

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
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

    def read(name: str) -> Any:
        return _read_json(path, name, cache_dir, token)

    def read_object(name: str) -> dict[str, Any]:
        value = read(name)
        if not isinstance(value, dict | None):
            raise UserError(f"{path}/{name}: expected a JSON object, found {type(value).__name__}")
        return value or {}

    settings = FolderSettings()
    modules = read("modules.json")
    if modules is not None:
        _read_modules(path, modules, read, settings)
    settings.adapter = read_object(_inside(settings.subfolder, _ADAPTER))
    if settings.adapter:
        settings.base = _base_of(f"{path}/{_inside(settings.subfolder, _ADAPTER)}", settings.adapter)
    if settings.source == "default":
        if settings.base is None:
            config = read_object("config.json")
        else:
            config = _read_json(settings.base, "config.json", cache_dir, token) or {}
        settings.pooling = "last_token" if _is_decoder(config) else "cls"
    bert = read_object(_inside(settings.subfolder, "sentence_bert_config.json"))
    if bert.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise UserError(
            f"{path}/sentence_bert_config.json: transformer_task is {bert['transformer_task']!r}: expected "
            "feature-extraction, the task of embedding models"
        )
    settings.lower_case = bool(bert.get("do_lower_case"))
    tokenizer = read_object(_inside(settings.subfolder, "tokenizer_config.json"))
    # older folders have the length in the first file, those of sentence-transformers 6 in the second
    for length in (bert.get("max_seq_length"), tokenizer.get("model_max_length")):
        if length is not None and 0 < length < _NO_LIMIT:
            settings.max_length = int(length)
            break
    own = read_object("config_sentence_transformers.json")
    settings.prompts = {name: text for name, text in (own.get("prompts") or {}).items() if text is not None}
    settings.default_prompt_name = own.get("default_prompt_name")
    if settings.default_prompt_name is not None and settings.default_prompt_name not in settings.prompts:
        raise UserError(
            f"{path}/config_sentence_transformers.json: default_prompt_name is {settings.default_prompt_name!r}: "
            f"expected one of its prompts: {', '.join(settings.prompts) or 'none'}"
        )
    return settings


def _base_of(file: str, adapter: Mapping[str, Any]) -> str:
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
        folders = [str(module["path"]) for module in modules]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}/modules.json: expected a list of modules with a type and a path") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        names = ", ".join(str(module["type"]) for module in modules)
        raise UserError(
            f"{path}/modules.json: expected Transformer, Pooling and optionally Normalize of sentence-transformers, in "
            f"this order; found {names}"
        )
    settings.source = "modules.json"
    settings.normalize = "Normalize" in kinds
    settings.subfolder = folders[0]
    file = _inside(folders[1], "config.json")
    pooling = read(file)
    if pooling is None:
        raise UserError(f"{path}/{file} is missing, which modules.json refers to")
    settings.pooling = _pooling_of(f"{path}/{file}", pooling)


def _pooling_of(file: str, config: Mapping[str, Any]) -> str:
    """Return the pooling from the content of the pooling module's config.json."""
    modes = config.get("pooling_mode")
    if modes is None:
        # in sentence-transformers, no switch means mean pooling
        modes = [mode for switch, mode in _OLD_SWITCHES.items() if config.get(switch)] or ["mean"]
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


def _read_json(path: str, name: str, cache_dir: str | None, token: str | bool | None) -> Any:
    """Return the content of a JSON file of the model, None if the model has no such file."""
    file = model_file(path, name, cache_dir, token)
    if file is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error


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


def vector_width(path: str, cache_dir: str | None = None, token: str | bool | None = None) -> int | None:
    """Return the width of a model's vectors from its config.json, None if it is not stated."""
    folder = path if os.path.isfile(os.path.join(path, "config.json")) else ""
    modules = None if folder else _read_json(path, "modules.json", cache_dir, token)
    subfolder = str(modules[0].get("path") or "") if isinstance(modules, list) and modules else ""
    config = _read_json(path, _inside(subfolder, "config.json"), cache_dir, token)
    widths = [config.get(name) for name in ("hidden_size", "dim", "d_model", "n_embd")] if config else []
    return next((width for width in widths if isinstance(width, int)), None)


def has_language_head(path: str, cache_dir: str | None = None, token: str | bool | None = None) -> bool:
    """Return True if a model was saved as a masked language model, according to its config.json."""
    config = _read_json(path, "config.json", cache_dir, token) or {}
    return any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in config.get("architectures") or [])


def check_model_folder(path: str, flag: str) -> None:
    """Raise UserError if `path` is a folder without a model, or no folder.

    A hub name (`name` or `owner/name`) that is no local path passes; the hub is not asked.

    Args:
        path: a folder, or a name on the hub.
        flag: flag for the message, such as "--model_name_or_path".
    """
    if not os.path.isdir(path):
        if os.path.exists(path):
            raise UserError(f"{flag} {path}: expected a model's folder, found a file")
        if path.startswith((".", "~", "/", os.sep)) or path.count("/") > 1 or not path.strip():
            raise UserError(f"{flag} {path}: no such folder")
        return
    modules = _read_json(path, "modules.json", None, None)
    subfolder = ""
    if isinstance(modules, list) and modules and isinstance(modules[0], dict):
        subfolder = str(modules[0].get("path") or "")
    weights_folder = os.path.join(path, subfolder)

    def has(*names: str) -> bool:
        return any(os.path.isfile(os.path.join(weights_folder, name)) for name in names)

    if has(_ADAPTER):
        if has(*_WEIGHTS):
            raise UserError(
                f"{flag} {path}: both a model's weights and adapters ({_ADAPTER}) are here: remove one of them"
            )
        if not has(*_ADAPTER_WEIGHTS):
            raise UserError(f"{flag} {path}: no weights here, expected one of {', '.join(_ADAPTER_WEIGHTS)}")
        require_peft(f"{flag} {path}, which holds adapters,")
        return
    if not has("config.json"):
        raise UserError(f"{flag} {path}: no model here, config.json is missing")
    if not has(*_WEIGHTS):
        raise UserError(f"{flag} {path}: no weights here, expected one of {', '.join(_WEIGHTS)}")


def check_reranker(name: str, flag: str, cache_dir: str | None = None, trust_remote_code: bool = False) -> None:
    """Raise UserError if `name` is no cross-encoder, that is, a sequence classifier with one output.

    Only its config.json is read. A hub name passes if the hub is unreachable; loading then fails.

    Args:
        name: a folder, or a name on the hub.
        flag: flag for the message, such as "--cross_encoder".
        cache_dir: folder for models from the hub.
        trust_remote_code: code in the model's folder may run.
    """
    check_model_folder(name, flag)
    expected = "expected a cross-encoder: a sequence classifier with one output, such as BAAI/bge-reranker-v2-m3"
    config = _read_json(name, "config.json", cache_dir, None)
    if os.path.isfile(os.path.join(name, _ADAPTER)):
        raise UserError(f"{flag} {name}: adapters alone are not supported, merge them into their base; {expected}")
    if config is None and not os.path.isdir(name):
        return
    config = config if isinstance(config, dict) else {}
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


def remove_weights(path: str | Path) -> None:
    """Remove weights and adapters of an earlier model from a folder that another model is written into."""
    shards = ("model-?????-of-?????.safetensors", "pytorch_model-?????-of-?????.bin")
    for pattern in ("config.json", *_WEIGHTS, *shards, _ADAPTER, *_ADAPTER_WEIGHTS):
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
