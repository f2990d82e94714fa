"""Checks of a model and its tokenizer once they are in memory: weights, token ids, words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raybge.model.folder import read_json
from raybge.model.setting_types import TOKENIZER
from raybge.util.errors import UserError, first_line

_LAYER = re.compile(r"\.(\d+)\.")  # the number of a layer in a weight's name


@contextmanager
def readable(subject: str) -> Iterator[None]:
    """Turn every error of a library that reads a damaged file into a UserError.

    Libraries meet damage wherever they use a value: errors of any type are possible. Lack of memory is not damage.

    Args:
        subject: start of the message, such as "the model X does not load".
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of libraries in Rust
            raise
        kind = "" if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: "
        raise UserError(f"{subject}: {kind}{' '.join(first_lines(error))}") from error


def first_lines(error: BaseException) -> list[str]:
    """Return the first line of a message, and the second one if the first only announces it."""
    first = first_line(error)
    lines = str(error).strip().splitlines()
    return [first, lines[1].strip()] if first.endswith(":") and len(lines) > 1 else [first]


def check_weights(name: str, backbone: Any, loading: dict[str, Any], whole: bool = True) -> None:
    """Raise UserError if a model's file does not hold this model; a pooler without weights is removed.

    Args:
        name: the model's name, for the message.
        backbone: the model.
        loading: transformers' report of missing, unused and mismatched weights.
        whole: False if the configuration is not the file's own, and may have fewer layers.
    """
    sizes = [
        f"{key} is {tuple(in_file)} in the file and {tuple(in_model)} in the model"
        for key, in_file, in_model in sorted(loading["mismatched_keys"])
    ]
    if sizes:
        raise UserError(f"the model {name}: weights do not have the shapes of its config.json: {'; '.join(sizes[:2])}")
    # a model with a head needs its pooler
    optional = "pooler." if backbone.base_model is backbone else ()
    missing = {key for key in loading["missing_keys"] if not key.startswith(optional)}
    if missing:
        raise UserError(f"the model {name} lacks weights: {', '.join(sorted(missing)[:5])} ({len(missing)} in total)")
    if whole and (layers := _unused_layers(backbone, loading.get("unexpected_keys", ()))):
        raise UserError(
            f"the model {name} has weights that its config.json has no layers for: {', '.join(layers[:3])} "
            f"({len(layers)} in total)"
        )
    if loading["missing_keys"]:
        backbone.pooler = None  # not in the file and unused here: it must not be saved with random weights
    check_finite(name, dict(backbone.named_parameters()))


def _unused_layers(backbone: Any, names: Sequence[str]) -> list[str]:
    """Return those of the unused weights that belong to a layer beyond the model's last one."""
    modules = backbone.base_model.named_modules()
    layers = {name: len(module) for name, module in modules if isinstance(module, torch.nn.ModuleList)}
    start = f"{backbone.base_model_prefix}."
    places = [(name, _LAYER.split(name.removeprefix(start), maxsplit=1)) for name in names]
    return sorted(name for name, place in places if len(place) == 3 and int(place[1]) >= layers.get(place[0], math.inf))


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError, with the tensor's name, if a model has weights that are not finite numbers."""
    for tensor_name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not _is_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"the model {name}: {count:,} of {tensor.numel():,} numbers of {tensor_name} are NaN or infinite: the "
                "training that wrote it diverged, or the file is damaged"
            )


def _is_finite(tensor: Tensor) -> bool:
    # a sum is many times faster; finite numbers can overflow in it
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def check_token_ids(tokenizer: Any, name: str, backbone: Any, model: str) -> None:
    """Raise UserError if a tokenizer has ids that the model has no embedding for.

    Args:
        tokenizer: tokenizer of transformers.
        name: its name, for the message.
        backbone: the transformers model, on the meta device too.
        model: the model's name, for the message.
    """
    rows = int(backbone.get_input_embeddings().num_embeddings)
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        raise UserError(
            f"the tokenizer of {name} has the token {token!r} with the id {number}, the model {model} has embeddings "
            f"for ids below {rows} ({len(beyond):,} tokens in total): expected a tokenizer of this model; for tokens "
            "that were added, call resize_token_embeddings(len(tokenizer)) of transformers and save both"
        )


def check_vocabulary(tokenizer: Any, name: str) -> None:
    """Raise UserError if a tokenizer has special tokens only, as transformers makes it without its files."""
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), "▁"}
    if not tokenizer.get_vocab().keys() - special:
        raise UserError(
            f"the tokenizer of {name} has no words: expected the files of its kind, such as tokenizer.json; copy them "
            "from the model that this one was trained from"
        )


def check_same_tokens(tokenizer: Any, folder: Path) -> None:
    """Raise UserError if a tokenizer differs from its tokenizer.json, where transformers guesses the class.

    Without `tokenizer_class` in tokenizer_config.json the class follows from the model's type, and some classes replace
    the parts that split a text and put special tokens around it.

    Args:
        tokenizer: the tokenizer as transformers loads it.
        folder: its folder.
    """
    import tokenizers

    file, config = folder / "tokenizer.json", read_json(str(folder), TOKENIZER) or {}
    if config.get("tokenizer_class") or not file.is_file() or not tokenizer.is_fast:
        return
    own = tokenizers.Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    words = sorted(own.get_vocab().items(), key=lambda item: item[1])[:500]
    text = " ".join([*(word for word, _ in words), "The first of 12,000 Straßen - naïve, isn't it? 你好"])
    if own.encode(text).ids != tokenizer(text)["input_ids"]:
        raise UserError(
            f"{folder / TOKENIZER}: tokenizer_class is missing, without which transformers splits texts otherwise than "
            "tokenizer.json: copy the file from the model that this one was trained from"
        )


def unknown_share(tokenizer: Any, texts: Sequence[str]) -> float:
    """Return the share of the words that a tokenizer has no tokens for, from 0 to 1; 0 without words.

    A word counts if at least half of its tokens are unknown; a slow tokenizer counts tokens. A tokenizer of bytes
    knows every word.

    Args:
        tokenizer: tokenizer of transformers.
        texts: sample of the data.

    Returns:
        The share.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or not texts:
        return 0.0
    if not tokenizer.is_fast:
        ids = [number for text in texts for number in tokenizer(text, add_special_tokens=False)["input_ids"]]
        return ids.count(unknown) / max(1, len(ids))
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    words = missing = 0
    for encoding in backend.encode_batch(list(texts), add_special_tokens=False):
        counts: dict[int, list[int]] = {}
        for number, word in zip(encoding.ids, encoding.word_ids, strict=True):
            counts.setdefault(-1 if word is None else word, []).append(number == unknown)
        words += len(counts)
        missing += sum(2 * sum(each) >= len(each) for each in counts.values())
    return missing / max(1, words)
