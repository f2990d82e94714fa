"""Types of the settings in a model's folder: a value of another type is refused before it acts.

Unchecked, the text "false" counts as true, true as 1, and "512" fails where it is compared, in a worker. The remaining
fields of config.json are checked by transformers' own configuration class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raybge.util.errors import UserError

_Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str | None)


# Accepted values of a field, as a message names them; null, an unset field, is accepted for each.
_CHECKS: dict[str, _Check] = {
    "a string": lambda value: isinstance(value, str),
    "an integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "a whole number above 0": lambda value: _is_number(value) and value > 0 and value == value // 1,
    "a number": _is_number,
    "true or false": lambda value: isinstance(value, bool),
    "an object": lambda value: isinstance(value, dict),
    "an object of strings": lambda value: isinstance(value, dict) and all(_is_text(each) for each in value.values()),
    "a list of strings": lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value),
    "a string or a list of strings": lambda value: isinstance(value, str) or _CHECKS["a list of strings"](value),
    "a string or an object": lambda value: isinstance(value, str | dict),
    "left or right": lambda value: value in ("left", "right"),
    "a list of objects": lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value),
}

MODULES, POOLING, CONFIG = "modules.json", "pooling", "config.json"
SENTENCE_BERT, SENTENCE_TRANSFORMERS = "sentence_bert_config.json", "config_sentence_transformers.json"
TOKENIZER, ADAPTER = "tokenizer_config.json", "adapter_config.json"

_TOKENS = "unk_token pad_token cls_token sep_token mask_token bos_token eos_token"
_SIZES = "vocab_size hidden_size dim d_model n_embd num_hidden_layers n_layer n_layers num_labels"
_POOLINGS = "cls_token mean_tokens max_tokens mean_sqrt_len_tokens weightedmean_tokens lasttoken"
# Fields by kind of file and accepted value.
_FIELDS: dict[str, dict[str, str]] = {
    MODULES: {"a string": "type path name"},
    POOLING: {
        "an integer": "word_embedding_dimension embedding_dimension",
        "true or false": " ".join(f"pooling_mode_{name}" for name in _POOLINGS.split()) + " include_prompt",
        "a string or a list of strings": "pooling_mode",
    },
    SENTENCE_BERT: {
        "a whole number above 0": "max_seq_length",
        "true or false": "do_lower_case",
        "a string": "transformer_task",
    },
    SENTENCE_TRANSFORMERS: {"an object of strings": "prompts", "a string": "default_prompt_name similarity_fn_name"},
    TOKENIZER: {
        "a whole number above 0": "model_max_length",
        "true or false": "do_lower_case do_basic_tokenize strip_accents tokenize_chinese_chars add_prefix_space "
        "split_special_tokens add_bos_token add_eos_token",
        "left or right": "padding_side truncation_side",
        "a string": "tokenizer_class",
        "a string or an object": _TOKENS,
        "a list of strings": "model_input_names",
        "an object": "added_tokens_decoder auto_map",
    },
    ADAPTER: {
        "an integer": "r",
        "a number": "lora_alpha lora_dropout",
        "true or false": "fan_in_fan_out use_rslora use_dora inference_mode",
        "a string": "base_model_name_or_path peft_type bias revision task_type",
        "a string or a list of strings": "target_modules exclude_modules",
        "a list of strings": "modules_to_save",
        "an object": "rank_pattern alpha_pattern auto_mapping",
    },
    CONFIG: {
        "an integer": _SIZES,
        "true or false": "is_encoder_decoder is_decoder tie_word_embeddings",
        "a string": "model_type dtype torch_dtype",
        "a list of strings": "architectures",
        "an object": "id2label label2id auto_map quantization_config text_config",
    },
}


def check_types(file: str, kind: str, content: Any) -> None:
    """Raise UserError if a settings file, or one of its fields, has another type than that kind of file has.

    Args:
        file: path of the file, for the message.
        kind: one of the constants of this module.
        content: the parsed JSON.
    """
    expected = "a list of objects" if kind == MODULES else "an object"
    if not _CHECKS[expected](content):
        raise UserError(f"{file}: expected {expected}, found {_describe(content)}")
    for each in content if kind == MODULES else [content]:
        for accepted, names in _FIELDS[kind].items():
            for name in names.split():
                value = each.get(name)
                if value is not None and not _CHECKS[accepted](value):
                    raise UserError(f"{file}: {name} is {_describe(value)}: expected {accepted}")


def _describe(value: Any) -> str:
    """Return a value's JSON type with the value, shortened."""
    text = repr(value)
    kinds = {str: "the string", bool: "", list: "the list", dict: "the object", int: "the number", float: "the number"}
    text = text.lower() if isinstance(value, bool) else text if len(text) <= 40 else f"{text[:40]}..."
    return f"{kinds.get(type(value), '')} {text}".strip()
