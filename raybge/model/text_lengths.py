"""Maximal lengths of texts in tokens, and the tokenizer that applies them, without the weights of the model."""

from __future__ import annotations

from functools import lru_cache

from raybge.data.prompts import Instructions
from raybge.data.tokenize import TextTokenizer
from raybge.model.embedding import max_positions
from raybge.model.folder import FolderSettings, read_settings
from raybge.model.loading import ModelLocation, load_tokenizer, make_empty
from raybge.model.spec import EncoderSpec
from raybge.util.errors import UserError

DEFAULT_MAX_LENGTH = 512  # FlagEmbedding's default, if neither flag nor folder nor model sets a length


def limit_length(max_length: int | None, settings: FolderSettings, positions: int | None) -> int:
    """Return a maximal length: the argument, else the folder's, at most the model's own.

    Args:
        max_length: the argument, None if it is not given.
        settings: settings of the model's folder.
        positions: most tokens that the model accepts; None: any number.

    Returns:
        Tokens, special ones included.

    Raises:
        UserError: a length below 1.
    """
    if max_length is not None and max_length < 1:
        raise UserError(f"a maximal length must be at least 1 token, found {max_length}")
    length = max_length or settings.max_length or positions or DEFAULT_MAX_LENGTH
    return length if positions is None else min(length, positions)


@lru_cache(maxsize=2)
def load_text_tokenizer(model: EncoderSpec) -> TextTokenizer:
    """Return the tokenizer of an encoder's queries and passages, once per process and model.

    Args:
        model: the encoder; only its configuration and tokenizer are read.

    Returns:
        The tokenizer, with the instructions and the lengths of `Encoder`.
    """
    name, cache_dir, token = model.model_name_or_path, model.cache_dir, model.token
    settings = read_settings(name, cache_dir, token)
    source = ModelLocation(name, settings, model.config_name, cache_dir, token, model.trust_remote_code)
    positions = max_positions(make_empty(source))
    instructions = Instructions(
        model.query_instruction_for_retrieval,
        model.query_instruction_format,
        model.passage_instruction_for_retrieval,
        model.passage_instruction_format,
        settings.prompts,
    )
    return TextTokenizer(
        load_tokenizer(source, model.tokenizer_name, model.use_fast_tokenizer),
        instructions,
        limit_length(model.query_max_length, settings, positions),
        limit_length(model.passage_max_length, settings, positions),
    )
