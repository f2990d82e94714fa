"""A model's folder: what it says about pooling, normalising, prompts and length, and writing one that does.

Nothing here imports torch, so a command can check the model's folder before it pays for loading anything.
The layout is sentence-transformers' (https://www.sbert.net/docs/package_reference/sentence_transformer/modules.html);
a folder without it is read by the recipe's defaults, normalised: an encoder's first token, a decoder's last.
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

POOLINGS = ("cls", "mean", "last_token")

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# decoders by their configuration's `model_type`, where `architectures` names the bare model
_DECODERS = frozenset(
    """bloom cohere falcon gemma gemma2 gemma3_text gpt2 gpt_neo gpt_neox gptj granite llama ministral mistral mixtral
    modernbert-decoder olmo olmo2 opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm starcoder2""".split()
)
# sentence-transformers' words for a pooling, in today's single setting and in the older row of booleans
_POOLING_OF_MODE = {"cls": "cls", "mean": "mean", "lasttoken": "last_token"}
_OLD_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# tokenizers that know no limit carry a huge number instead of none
_NO_LIMIT = 10**9


@dataclass
class FolderSettings:
    """What a model's folder says about turning a text into a vector.

    `prompts` has the keys "query" and "document" where the folder gives them, beside others it may name; a
    prompt is put in front of the text. `max_length` counts tokens, special ones included; None: the folder
    does not say. `source` is "modules.json", or "default" when the folder has none. `subfolder` is where the
    weights lie inside the folder (old sentence-transformers folders have them in "0_Transformer"). `base` is set where
    the folder holds low-rank adapters: the model that they belong to; `adapter` is then their adapter_config.json.
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
    """The settings of a local model folder, or of a model on the hub (its few small JSON files are fetched).

    Raises UserError for a folder whose vectors raybge could not reproduce: a module other than Transformer,
    Pooling and Normalize, another pooling, a prompt left out of the pooling, a file that is not JSON.
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
        settings.pooling = "last_token" if _decodes(config) else "cls"
    bert = read_object(_inside(settings.subfolder, "sentence_bert_config.json"))
    if bert.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise UserError(f"{path}: the task {bert['transformer_task']!r} is not one of an embedding model")
    settings.lower_case = bool(bert.get("do_lower_case"))
    tokenizer = read_object(_inside(settings.subfolder, "tokenizer_config.json"))
    # older folders keep the length in the first file, sentence-transformers 6 keeps it in the second
    for length in (bert.get("max_seq_length"), tokenizer.get("model_max_length")):
        if length is not None and 0 < length < _NO_LIMIT:
            settings.max_length = int(length)
            break
    own = read_object("config_sentence_transformers.json")
    settings.prompts = {name: text for name, text in (own.get("prompts") or {}).items() if text is not None}
    settings.default_prompt_name = own.get("default_prompt_name")
    if settings.default_prompt_name is not None and settings.default_prompt_name not in settings.prompts:
        raise UserError(f"{path}: the default prompt {settings.default_prompt_name!r} is not among its prompts")
    return settings


def _base_of(where: str, adapter: Mapping[str, Any]) -> str:
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{where}: base_model_name_or_path is missing: which model do the adapters belong to?")
    if os.path.isabs(base) and not os.path.isdir(base):
        raise UserError(f"{where}: the adapters belong to the model {base}, and no such folder is here")
    return base


def _decodes(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a decoder, whose first token knows nothing of the text behind it."""
    names = [str(name) for name in config.get("architectures") or []]
    return config.get("model_type") in _DECODERS or any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in names)


def _read_modules(path: str, modules: Any, read: Any, settings: FolderSettings) -> None:
    try:
        kinds = [_kind(module["type"]) for module in modules]
        folders = [str(module["path"]) for module in modules]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}/modules.json: expected a list of modules with a type and a path") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        names = ", ".join(str(module["type"]) for module in modules)
        raise UserError(
            f"{path}/modules.json: raybge understands Transformer, Pooling and, if wanted, Normalize of "
            f"sentence-transformers, in this order; this model has: {names}"
        )
    settings.source = "modules.json"
    settings.normalize = "Normalize" in kinds
    settings.subfolder = folders[0]
    where = _inside(folders[1], "config.json")
    pooling = read(where)
    if pooling is None:
        raise UserError(f"{path}/{where} is missing, though modules.json names it")
    settings.pooling = _pooling_of(f"{path}/{where}", pooling)


def _pooling_of(where: str, config: Mapping[str, Any]) -> str:
    modes = config.get("pooling_mode")
    if modes is None:
        # sentence-transformers means the mean where no switch is on
        modes = [mode for switch, mode in _OLD_SWITCHES.items() if config.get(switch)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLING_OF_MODE:
        raise UserError(f"{where}: raybge pools by cls, mean or lasttoken, one of them; this model has: {modes}")
    if config.get("include_prompt") is False:
        raise UserError(f"{where}: leaving the prompt out of the pooling (include_prompt) is not supported")
    return _POOLING_OF_MODE[modes[0]]


def _kind(module_type: str) -> str:
    """Transformer for sentence_transformers.models.Transformer and for the longer path of version 6."""
    own = module_type.startswith("sentence_transformers.")
    return module_type.rsplit(".", 1)[-1] if own else module_type


def _inside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _read_json(path: str, name: str, cache_dir: str | None, token: str | bool | None) -> Any:
    """The content of a JSON file of the model, None where the model has no such file."""
    found: str | None = os.path.join(path, name)
    if not os.path.isdir(path):
        found = _from_hub(path, name, cache_dir, token)
    if found is None or not os.path.isfile(found):
        return None
    try:
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{found}: not JSON ({error})") from error


def _from_hub(repo: str, name: str, cache_dir: str | None, token: str | bool | None) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return hf_hub_download(repo, name, cache_dir=cache_dir, token=token)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        # no such file, or no hub in reach: a model that cannot be had at all is named when its weights load
        return None


def vector_width(path: str, cache_dir: str | None = None, token: str | bool | None = None) -> int | None:
    """Width of a model's vectors as its config.json says, None where it does not."""
    folder = path if os.path.isfile(os.path.join(path, "config.json")) else ""
    modules = None if folder else _read_json(path, "modules.json", cache_dir, token)
    place = str(modules[0].get("path") or "") if isinstance(modules, list) and modules else ""
    config = _read_json(path, _inside(place, "config.json"), cache_dir, token)
    widths = [config.get(name) for name in ("hidden_size", "dim", "d_model", "n_embd")] if config else []
    return next((width for width in widths if isinstance(width, int)), None)


def has_language_head(path: str, cache_dir: str | None = None, token: str | bool | None = None) -> bool:
    """Whether a model was saved as a masked language model, as its config.json says."""
    config = _read_json(path, "config.json", cache_dir, token) or {}
    return any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in config.get("architectures") or [])


def check_model_folder(path: str, flag: str) -> None:
    """Stop with a UserError that names the flag if `path` is a folder without a model, or no folder at all.

    A hub's name (`name` or `owner/name`) that is no local path passes: only the hub can say.
    """
    if not os.path.isdir(path):
        if os.path.exists(path):
            raise UserError(f"{flag} {path}: expected a model's folder, this is a file")
        if path.startswith((".", "~", "/", os.sep)) or path.count("/") > 1 or not path.strip():
            raise UserError(f"{flag} {path}: no such folder")
        return
    modules = _read_json(path, "modules.json", None, None)
    places = [""]
    if isinstance(modules, list) and modules and isinstance(modules[0], dict):
        places = [str(modules[0].get("path") or "")]
    place = os.path.join(path, places[0])

    def has(*names: str) -> bool:
        return any(os.path.isfile(os.path.join(place, name)) for name in names)

    if has(_ADAPTER):
        if has(*_WEIGHTS):
            raise UserError(f"{flag} {path}: both a model's weights and adapters ({_ADAPTER}) are here: remove one")
        if not has(*_ADAPTER_WEIGHTS):
            raise UserError(f"{flag} {path}: no weights here, expected one of {', '.join(_ADAPTER_WEIGHTS)}")
        require_peft(f"{flag} {path}, which holds adapters,")
        return
    if not has("config.json"):
        raise UserError(f"{flag} {path}: no model here, config.json is missing")
    if not has(*_WEIGHTS):
        raise UserError(f"{flag} {path}: no weights here, expected one of {', '.join(_WEIGHTS)}")


def check_reranker(name: str, flag: str, cache_dir: str | None = None, trust_remote_code: bool = False) -> None:
    """Stop with a UserError that names the flag if `name` is no cross-encoder: a sequence classifier with one output.

    Only its config.json is read. A hub's name passes where the hub is out of reach: loading will say.
    """
    check_model_folder(name, flag)
    expected = "expected a cross-encoder: a sequence classifier with one output, such as BAAI/bge-reranker-v2-m3"
    config = _read_json(name, "config.json", cache_dir, None)
    if os.path.isfile(os.path.join(name, _ADAPTER)):
        raise UserError(f"{flag} {name}: adapters alone are not supported here, merge them into their base; {expected}")
    if config is None and not os.path.isdir(name):
        return
    config = config if isinstance(config, dict) else {}
    kinds = [str(kind) for kind in config.get("architectures") or []]
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        raise UserError(f"{flag} {name}: language models as rerankers ({kinds[0]}) are not supported; {expected}")
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        found = ", ".join(kinds) or "a model without a head"
        raise UserError(f"{flag} {name}: {found} does not score pairs; {expected}")
    # transformers leaves the labels out of the file where they are two
    outputs = len(config.get("id2label") or ()) or config.get("num_labels", 2)
    if outputs != 1:
        raise UserError(f"{flag} {name}: this classifier has {outputs} outputs; {expected}")
    code = (config.get("auto_map") or {}).get("AutoModelForSequenceClassification")
    if code and not trust_remote_code:
        from transformers import CONFIG_MAPPING  # imports torch

        if config.get("model_type") not in CONFIG_MAPPING:
            raise UserError(f"{flag} {name}: this model runs code of its own ({code}); allow it by --trust_remote_code")


def remove_weights(path: str | Path) -> None:
    """Remove an earlier model's weights and adapters from a folder that gets another's: never must both be there."""
    shards = ("model-?????-of-?????.safetensors", "pytorch_model-?????-of-?????.bin")
    for pattern in ("config.json", *_WEIGHTS, *shards, _ADAPTER, *_ADAPTER_WEIGHTS):
        for old in Path(path).glob(pattern):
            old.unlink()


def write_settings(path: str | Path, settings: FolderSettings, dim: int, versions: Mapping[str, str]) -> None:
    """Write the files by which sentence-transformers, old and new, does what `settings` says.

    Module types are the older names, which every version of it reads; of the pooling's switches only those
    that the oldest versions know are written, since they refuse any other. `dim` is the width of a vector,
    `versions` is kept for the record, e.g. {"transformers": "5.23.0"}. Everything is written at the folder's
    top, whatever `settings.subfolder` says.
    """
    folder = Path(path)
    names = ["Transformer", "Pooling"] + ["Normalize"] * settings.normalize
    places = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{name}"}
        for i, (name, place) in enumerate(zip(names, places, strict=False))
    ]
    for place in places[: len(names)]:
        (folder / place).mkdir(parents=True, exist_ok=True)
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
            "__version__": dict(versions),
            "prompts": settings.prompts,
            "default_prompt_name": settings.default_prompt_name,
            "similarity_fn_name": "cosine" if settings.normalize else "dot",
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
