"""Tokenize queries and passages with their instructions; long texts are only tokenized as far as needed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raybge.data.prompts import Instructions

HEAD_CHARACTERS = 8  # characters of a long text that are tokenized first, per token of the maximum length
MARGIN = 16  # tokens that must follow the maximum length within these characters


@dataclass(frozen=True)
class TextTokenizer:
    """Tokenizer of a model's queries and passages.

    Args:
        tokenizer: tokenizer of transformers.
        instructions: instructions; a row's own prompt replaces the query's.
        query_max_len: tokens of a query, with special tokens.
        passage_max_len: tokens of a passage, with special tokens.
    """

    tokenizer: Any
    instructions: Instructions
    query_max_len: int
    passage_max_len: int

    def __call__(self, queries: Sequence[tuple[str, str | None]], passages: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Tokenize queries and passages.

        Args:
            queries: (query, prompt of its row) of each query.
            passages: the passages.

        Returns:
            Lengths and concatenated tokens, int32, of the queries, then of the passages.
        """
        texts = [self.instructions.query_text(*query) for query in queries]
        ids = token_ids(self.tokenizer, texts, self.query_max_len)
        texts = [self.instructions.passage_text(text) for text in passages]
        ids += token_ids(self.tokenizer, texts, self.passage_max_len)
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        return lengths, np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum()))


def token_ids(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Return the ids of `tokenizer(texts, truncation=True, max_length=max_length)`."""
    if not texts:
        return []
    encodings = encode_heads(tokenizer, texts, max_length)
    if encodings is not None:
        return [each.ids for each in encodings]
    ids: list[list[int]] = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    return ids


def encode_heads(tokenizer: Any, texts: list[str], max_length: int, words: bool = False) -> list[Any] | None:
    """Return the Rust tokenizer's encodings of texts cut to `max_length`.

    A text of many times the length is tokenized up to a white space some way after the cut. With a pre-tokenizer,
    tokens are words or parts of words, so later text cannot change them. If the head is too short, the whole text is
    tokenized.

    Args:
        tokenizer: tokenizer of transformers.
        texts: the texts.
        max_length: tokens, with special tokens.
        words: compute the word of each token (`word_ids`) as well, which takes longer.

    Returns:
        The encodings; None if the tokenizer is not a Rust tokenizer, or truncates at the beginning of a text.
    """
    backend = _backend(tokenizer, max_length)
    if backend is None:
        return None
    encode = backend.encode_batch if words else backend.encode_batch_fast
    limit = HEAD_CHARACTERS * max_length
    heads = [_head(text, limit) if backend.pre_tokenizer is not None else text for text in texts]
    encodings: list[Any] = encode(heads)
    again = [
        i
        for i, (head, text) in enumerate(zip(heads, texts, strict=True))
        if len(head) < len(text) and sum(len(rest) for rest in encodings[i].overflowing) < MARGIN
    ]
    for i, whole in zip(again, encode([texts[i] for i in again]), strict=True):
        encodings[i] = whole
    return encodings


def _backend(tokenizer: Any, max_length: int) -> Any:
    """Return the Rust tokenizer, set to cut the end of texts at `max_length`; None if there is none."""
    if not tokenizer.is_fast or tokenizer.truncation_side != "right":
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length)
    backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
    return backend


def _head(text: str, limit: int) -> str:
    """Return the text up to the last space or line end before `limit`, or all of it if that saves little."""
    if len(text) < 1.5 * limit:
        return text
    end = max(text.rfind(" ", 0, limit), text.rfind("\n", 0, limit))
    return text[:end] if end > limit // 2 else text
