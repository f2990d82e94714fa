"""Texts to token ids: instructions in front, cut to length, long texts not read to their end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raybge.data.prompts import Instructions

HEAD_CHARACTERS = 8  # of a long text are tokenised at first, for each token that may be kept
MARGIN = 16  # tokens that must lie between what is kept and the end of the head


@dataclass(frozen=True)
class TextTokenizer:
    """A model's way from queries and passages to token ids.

    Args:
        tokenizer: of transformers.
        instructions: what goes before queries and passages; a row's own prompt replaces the query's.
        query_max_len, passage_max_len: in tokens, special ones included.
    """

    tokenizer: Any
    instructions: Instructions
    query_max_len: int
    passage_max_len: int

    def __call__(self, queries: Sequence[tuple[str, str | None]], passages: Sequence[str]) -> tuple[np.ndarray, ...]:
        """(lengths, tokens), int32, of the queries and then of the passages; a query comes with its row's prompt."""
        texts = [self.instructions.query_text(*query) for query in queries]
        ids = token_ids(self.tokenizer, texts, self.query_max_len)
        texts = [self.instructions.passage_text(text) for text in passages]
        ids += token_ids(self.tokenizer, texts, self.passage_max_len)
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        return lengths, np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum()))


def token_ids(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """What `tokenizer(texts, truncation=True, max_length=max_length)` gives."""
    if not texts:
        return []
    found = encode_heads(tokenizer, texts, max_length)
    if found is not None:
        return [each.ids for each in found]
    return tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]


def encode_heads(tokenizer: Any, texts: list[str], max_length: int, words: bool = False) -> list[Any] | None:
    """The Rust tokenizer's encodings of texts cut to `max_length`; None where there is none or it keeps a text's end.

    A text of many times the length is tokenised up to a white space some way behind what is kept. Tokens are words
    or parts of words wherever there is a pre-tokenizer, so what comes later cannot change those; where the head
    turns out to be too short, the whole text is tokenised after all.

    `words`: each encoding also knows the word of each token (`word_ids`), which takes longer.
    """
    backend = _backend(tokenizer, max_length)
    if backend is None:
        return None
    encode = backend.encode_batch if words else backend.encode_batch_fast
    limit = HEAD_CHARACTERS * max_length
    heads = [_head(text, limit) if backend.pre_tokenizer is not None else text for text in texts]
    found = encode(heads)
    again = [
        i
        for i, (head, text) in enumerate(zip(heads, texts, strict=True))
        if len(head) < len(text) and sum(len(rest) for rest in found[i].overflowing) < MARGIN
    ]
    for i, whole in zip(again, encode([texts[i] for i in again]), strict=True):
        found[i] = whole
    return found


def _backend(tokenizer: Any, max_length: int) -> Any:
    """The Rust tokenizer, set to cut at `max_length`; None where there is none or it keeps a text's end."""
    if not tokenizer.is_fast or tokenizer.truncation_side != "right":
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length)
    backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
    return backend


def _head(text: str, limit: int) -> str:
    """The text up to the last space or line end before `limit`; the whole of it where that saves little."""
    if len(text) < 1.5 * limit:
        return text
    end = max(text.rfind(" ", 0, limit), text.rfind("\n", 0, limit))
    return text[:end] if end > limit // 2 else text
