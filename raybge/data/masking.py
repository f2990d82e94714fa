"""From a step's texts to what RetroMAE's pre-training reads: tokens, and what the encoder and the decoder do not see.

The recipe (https://arxiv.org/abs/2205.12035) hides whole words: a share of a text's tokens from the encoder, and for
each position of the text another choice from the decoder. This runs where the rows are read. A choice is a bit a token,
so a step of 64 texts of 512 tokens weighs 1.4 MB; the decoder's mask, (64, 512, 512), is made of it where it is used.

Letters in array names: T tokens of a text, W words of it, R choices of words, S bytes that hold a bit for each token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from raybge.data.collate import column_values, split_texts
from raybge.data.groups import parse_passage
from raybge.data.jsonl import Parse, Row
from raybge.data.mixture import generator
from raybge.data.tokenize import encode_heads
from raybge.util.errors import UserError

CHOICES = 256  # of a text's words, at most, that its positions share, as in the recipe
# Tokens of the longest word. What is longer (a sentence in a script without spaces, an address) hides token by token.
LONGEST_WORD = 8
STRETCH = 32  # words looked at together for one that fits
SHOWN_MASK, SHOWN_OTHER = 0.8, 0.1  # of what is hidden from the encoder: the mask token, and a random one; else itself

# A step's share is one row; see MaskedText. Texts lie one after the other.
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("file", pa.list_(pa.int32())),
        ("offset", pa.list_(pa.int64())),
        ("lengths", pa.list_(pa.int32())),
        ("token", pa.list_(pa.int32())),
        ("shown", pa.list_(pa.int32())),
        ("masked", pa.list_(pa.bool_())),
        ("ordinary", pa.list_(pa.bool_())),
        ("pick", pa.list_(pa.uint8())),
        ("visible", pa.list_(pa.uint8())),
    ]
)


@dataclass(frozen=True)
class MaskedText:
    """One text of T tokens.

    `token_T`: its ids, int32. `ordinary_T`: bool, False for the special tokens that the tokenizer puts around a text.
    `shown_T`: ids that the encoder is given, int32; `masked_T`: bool, tokens that it is asked for.
    `visible_RS`: R = min(T, 256) choices of tokens that the decoder sees, packed by np.packbits, uint8; `pick_T`: which
    of them is that of each position, uint8.
    """

    token_T: np.ndarray
    ordinary_T: np.ndarray
    shown_T: np.ndarray
    masked_T: np.ndarray
    visible_RS: np.ndarray
    pick_T: np.ndarray


@dataclass(frozen=True)
class MaskedBatch:
    """One worker's share of a step. `rows`: (file, offset) of each text."""

    step: int
    rows: list[tuple[int, int]]
    texts: list[MaskedText]

    @property
    def token_ids(self) -> list[np.ndarray]:
        """The texts' own ids."""
        return [text.token_T for text in self.texts]


@dataclass(frozen=True)
class TextMasker:
    """Tokenises texts and draws what is hidden of them. Masks follow from seed, epoch and row alone.

    Args:
        tokenizer: of transformers. UserError where it has no mask token.
        max_seq_length: in tokens, special ones included.
        seed: of the masks, together with epoch and row.
        encoder_mlm_probability, decoder_mlm_probability: the share of a text's tokens that is hidden.
    """

    tokenizer: Any
    max_seq_length: int
    seed: int
    encoder_mlm_probability: float = 0.3
    decoder_mlm_probability: float = 0.5
    schema: ClassVar[pa.Schema] = SCHEMA

    @property
    def parse(self) -> Parse:
        """Of a row, as a stream asks for it."""
        return parse_passage

    def unpack(self, table: pa.Table) -> MaskedBatch:
        """As a stream asks for it."""
        return unpack_masked(table)

    def __post_init__(self) -> None:
        check_mask_token(self.tokenizer)

    def __call__(self, epoch: int, step: int, rows: Sequence[Row], copies: Sequence[int] | None = None) -> pa.Table:
        """The share of a step as a table of one row (see SCHEMA); a row's value is its text.

        `copies`: which of its appearances in the epoch each row's is, counted from 0; each draws anew.
        """
        tokens = self.tokenize([row.value for row in rows])
        texts = [
            self.mask(token_T, word_T, generator("mask", self.seed, epoch, row.file, row.offset, copy))
            for row, copy, (token_T, word_T) in zip(rows, copies or [0] * len(rows), tokens, strict=True)
        ]
        columns = dict(
            file=[row.file for row in rows],
            offset=[row.offset for row in rows],
            lengths=[len(text.token_T) for text in texts],
            token=_joined([text.token_T for text in texts]),
            shown=_joined([text.shown_T for text in texts]),
            masked=_joined([text.masked_T for text in texts]),
            ordinary=_joined([text.ordinary_T for text in texts]),
            pick=_joined([text.pick_T for text in texts]),
            visible=_joined([text.visible_RS.ravel() for text in texts]),
        )
        return pa.table({"step": [step], **{name: [values] for name, values in columns.items()}}, schema=SCHEMA)

    def tokenize(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(token_T, word_T) of each text: its ids, int32, and the number of the word that each token is of, from 0 on;
        -1 for special tokens.

        A word is what the tokenizer splits into tokens, or "##" joins; one of more than LONGEST_WORD tokens is none.
        """
        if not texts:
            return []
        options = {"truncation": True, "max_length": self.max_seq_length}
        if self.tokenizer.is_fast:
            found = encode_heads(self.tokenizer, texts, self.max_seq_length, words=True)
            found = self.tokenizer(texts, **options).encodings if found is None else found
            # None, which special tokens have, becomes nan
            marked = [(each.ids, np.array(each.word_ids, np.float64)) for each in found]
        else:
            marked = [(ids, self._joins(ids)) for ids in self.tokenizer(texts, **options)["input_ids"]]
        # models refuse a text of no token, which tokenizers without special tokens make of control characters
        nothing = np.array([self.tokenizer.mask_token_id], np.int32), np.array([-1])
        return [(np.array(ids, np.int32), number_words(mark_T)) if ids else nothing for ids, mark_T in marked]

    def count(self, texts: Sequence[str], vocabulary: int) -> np.ndarray:
        """How often each token of a vocabulary of this size is in the texts: (V,) int64, special ones never."""
        tokens = [token_T[word_T >= 0] for token_T, word_T in self.tokenize([*texts])]
        return np.bincount(np.concatenate([np.zeros(0, np.int32), *tokens]), minlength=vocabulary)

    def _joins(self, ids: list[int]) -> np.ndarray:
        """As `word_ids` of a Rust tokenizer, for one that is not: the pieces of a word but the first begin with ##."""
        special = {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id, self.tokenizer.mask_token_id}
        pieces = np.array(self.tokenizer.convert_ids_to_tokens(ids), np.str_)
        word_T = (~np.char.startswith(pieces, "##")).cumsum()
        return np.where(np.isin(ids, [*special]), np.nan, word_T)

    def mask(self, token_T: np.ndarray, word_T: np.ndarray, random: np.random.Generator) -> MaskedText:
        """Draw what is hidden of a text, given as `tokenize` gives it."""
        tokens = len(token_T)
        size_W = np.bincount(word_T[word_T >= 0])
        encoder, decoder = (
            max(1, round(tokens * share)) for share in (self.encoder_mlm_probability, self.decoder_mlm_probability)
        )
        choices = min(tokens, CHOICES)
        # the first choice is the encoder's
        budget_R = np.array([encoder, *[decoder] * choices])
        hidden_RT = _of_tokens(draw_words(size_W, budget_R, random), word_T)
        return MaskedText(
            token_T,
            word_T >= 0,
            self._shown(token_T, hidden_RT[0], random),
            hidden_RT[0],
            np.packbits(~hidden_RT[1:], axis=1),
            random.integers(choices, size=tokens, dtype=np.uint8),
        )

    def _shown(self, token_T: np.ndarray, masked_T: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """What the encoder is given for a text of which some tokens are hidden from it."""
        chance_T = random.random(len(token_T))
        other_T = self._words[random.integers(len(self._words), size=len(token_T))]
        shown_T = np.where(masked_T & (chance_T < SHOWN_MASK), self._mask, token_T)
        return np.where(masked_T & (chance_T >= 1 - SHOWN_OTHER), other_T, shown_T)

    @functools.cached_property
    def _mask(self) -> np.int32:
        return np.int32(self.tokenizer.mask_token_id)  # which takes the tokenizer longer than a text's masks

    @functools.cached_property
    def _words(self) -> np.ndarray:
        """All ids but special ones: padding in a text would shift positions in RoBERTa-like models."""
        ids = np.array([*self.tokenizer.get_vocab().values()], np.int32)
        return np.setdiff1d(ids, np.array(self.tokenizer.all_special_ids, np.int32))


def check_mask_token(tokenizer: Any, name: str | None = None) -> None:
    """Stop with a UserError that names the tokenizer, or `name`, where it has no mask token."""
    if tokenizer.mask_token_id is None:
        raise UserError(
            f"the tokenizer of {name or tokenizer.name_or_path} has no mask token, which pre-training puts where words "
            "are to be guessed: take the model of a masked language model, such as BERT's or RoBERTa's"
        )


def number_words(mark_T: np.ndarray) -> np.ndarray:
    """The words of a text, counted from 0: neighbours with the same mark are one. nan: no word, -1."""
    ordinary_T = ~np.isnan(mark_T)
    first_T = ordinary_T & (mark_T != np.concatenate([[np.nan], mark_T[:-1]]))
    word_T = np.where(ordinary_T, first_T.cumsum() - 1, -1)
    if ordinary_T.any():
        first_T |= ordinary_T & (np.bincount(word_T[ordinary_T])[word_T] > LONGEST_WORD)
    return np.where(ordinary_T, first_T.cumsum() - 1, -1)


def draw_words(size_W: np.ndarray, budget_R: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """R choices of a text's words, (R, W) bool, each drawn as the recipe draws one.

    The words come in random order, and each is taken that still fits into the choice's budget of tokens.
    `size_W`: tokens of each word.
    """
    choices, words = len(budget_R), len(size_W)
    if not words:
        return np.zeros((choices, 0), bool)
    # each word's random number ends with the word's own, which so comes with it when they are sorted
    low = np.uint32((1 << (words - 1).bit_length()) - 1)
    raw = random.bit_generator.random_raw((choices * words + 1) // 2).view(np.uint32)
    key_RW = raw[: choices * words].reshape(choices, words)
    key_RW &= ~low
    key_RW |= np.arange(words, dtype=np.uint32)
    sorted_RW = np.sort(key_RW, axis=1)
    # a word has a token at least, so that no more can be taken at first
    filled_RW = size_W.take(sorted_RW[:, : budget_R.max()] & low, mode="clip").cumsum(axis=1)
    taken_R = (filled_RW <= budget_R[:, None]).sum(axis=1)
    rows_R, last_R = np.arange(choices), np.maximum(taken_R - 1, 0)
    chosen_RW = key_RW <= sorted_RW[rows_R, last_R][:, None]
    chosen_RW[taken_R == 0] = False
    left_R = budget_R - np.where(taken_R > 0, filled_RW[rows_R, last_R], 0)
    _fill(chosen_RW, size_W, sorted_RW, low, taken_R, left_R)
    return chosen_RW


def _fill(
    chosen_RW: np.ndarray,
    size_W: np.ndarray,
    sorted_RW: np.ndarray,
    low: np.uint32,
    taken_R: np.ndarray,
    left_R: np.ndarray,
) -> None:
    """Take, in place, what still fits of the words behind the first that did not, a stretch of the order at a time."""
    words, smallest = len(size_W), size_W.min()
    rows, at, left = np.arange(len(left_R)), taken_R + 1, left_R
    while True:
        more = (left >= smallest) & (at < words)
        if not more.any():
            return
        rows, at, left = rows[more], at[more], left[more]
        place = at[:, None] + np.arange(STRETCH)
        word = sorted_RW[rows[:, None], np.minimum(place, words - 1)] & low
        fits = (size_W[word] <= left[:, None]) & (place < words)
        found, first = fits.any(axis=1), fits.argmax(axis=1)
        word = word[np.arange(len(word)), first]
        chosen_RW[rows[found], word[found]] = True
        left = left - np.where(found, size_W[word], 0)
        at = at + np.where(found, first + 1, STRETCH)


def _of_tokens(chosen_RW: np.ndarray, word_T: np.ndarray) -> np.ndarray:
    """(R, T) bool: the tokens of the chosen words. No special token is one."""
    none_R1 = np.zeros((len(chosen_RW), 1), bool)  # where -1 points to
    return np.concatenate([chosen_RW, none_R1], axis=1).take(word_T, axis=1)


def _joined(arrays: list[np.ndarray]) -> np.ndarray | list[Any]:
    return np.concatenate(arrays) if arrays else []


def unpack_masked(table: pa.Table) -> MaskedBatch:
    """The MaskedBatch of a table of one row."""
    column = {name: column_values(table, name) for name in SCHEMA.names[1:]}
    lengths = column["lengths"]
    choices, size = np.minimum(lengths, CHOICES), -(-lengths // 8)
    visible = split_texts(column["visible"], choices.astype(np.int64) * size)
    parts = [split_texts(column[name], lengths) for name in ("token", "ordinary", "shown", "masked", "pick")]
    return MaskedBatch(
        step=table.column("step")[0].as_py(),
        rows=list(zip(column["file"].tolist(), column["offset"].tolist(), strict=True)),
        texts=[
            MaskedText(token, ordinary, shown, masked, bits.reshape(count, -1), pick)
            for token, ordinary, shown, masked, pick, bits, count in zip(*parts, visible, choices, strict=True)
        ],
    )
