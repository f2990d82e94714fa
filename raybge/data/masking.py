"""Make batches for RetroMAE's pre-training: token ids, and the tokens that are masked for encoder and decoder.

RetroMAE (https://arxiv.org/abs/2205.12035) masks whole words: a share of a text's tokens for the encoder, and for each
position of the text another choice of words for the decoder. This runs in the reading tasks. A choice has one bit per
token, so a step of 64 texts of 512 tokens takes 1.4 MB; the decoder's mask, (64, 512, 512), is built from it where it
is used.

Letters in array names: T tokens of a text, W its words, R choices of words, S bytes with one bit per token.
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

CHOICES = 256  # most choices of words that the positions of a text share, as in RetroMAE
# Tokens of the longest word. Anything longer (a sentence in a script without spaces, a URL) is masked by token.
LONGEST_WORD = 8
STRETCH = 32  # words that are checked together for one that fits
SHOWN_MASK, SHOWN_OTHER = 0.8, 0.1  # share of masked tokens replaced by the mask token, by a random token; else kept

# One worker's share of a step is one row, see MaskedText. Texts are concatenated.
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

    Args:
        token_T: token ids, int32.
        ordinary_T: bool, False for the special tokens that the tokenizer puts around a text.
        shown_T: input ids of the encoder, int32.
        masked_T: bool, tokens that the encoder has to predict.
        visible_RS: R = min(T, 256) choices of tokens that the decoder sees, packed by np.packbits, uint8.
        pick_T: index of each position's choice, uint8.
    """

    token_T: np.ndarray
    ordinary_T: np.ndarray
    shown_T: np.ndarray
    masked_T: np.ndarray
    visible_RS: np.ndarray
    pick_T: np.ndarray


@dataclass(frozen=True)
class MaskedBatch:
    """One worker's share of a step.

    Args:
        step: number of the step within the epoch.
        rows: (file, offset) of each text.
        texts: the texts.
    """

    step: int
    rows: list[tuple[int, int]]
    texts: list[MaskedText]

    @property
    def token_ids(self) -> list[np.ndarray]:
        """Token ids of each text."""
        return [text.token_T for text in self.texts]

    def numel(self) -> int:
        """Return the number of tokens; transformers' Trainer counts them by this name."""
        return sum(map(len, self.token_ids))


@dataclass(frozen=True)
class TextMasker:
    """Tokenizes texts and samples their masks, which depend on seed, epoch and row only.

    Args:
        tokenizer: tokenizer of transformers; UserError if it has no mask token.
        max_seq_length: tokens of a text, with special tokens.
        seed: seed of the masks, together with epoch and row.
        encoder_mlm_probability: share of a text's tokens that is masked for the encoder.
        decoder_mlm_probability: share of a text's tokens that is masked for the decoder.
        schema: schema of the tables.
    """

    tokenizer: Any
    max_seq_length: int
    seed: int
    encoder_mlm_probability: float = 0.3
    decoder_mlm_probability: float = 0.5
    schema: ClassVar[pa.Schema] = SCHEMA

    @property
    def parse(self) -> Parse:
        """Function that parses a row."""
        return parse_passage

    def unpack(self, table: pa.Table) -> MaskedBatch:
        """Return the batch of a table of one row."""
        return unpack_masked(table)

    def __post_init__(self) -> None:
        check_mask_token(self.tokenizer)

    def __call__(self, epoch: int, step: int, rows: Sequence[Row], copies: Sequence[int] | None = None) -> pa.Table:
        """Return one worker's share of a step as a table of one row (see SCHEMA).

        Args:
            epoch: number of the epoch.
            step: number of the step within the epoch.
            rows: rows whose value is a text; may be empty.
            copies: for each row how often the epoch had it before; each copy has other masks. Default: 0.

        Returns:
            The table.
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
        """Return (token_T, word_T) of each text: int32 ids, and the number of each token's word, -1 if special.

        Words are the units that the tokenizer splits into tokens, or that "##" joins. In a word of more than
        LONGEST_WORD tokens, each token counts as a word.
        """
        if not texts:
            return []
        options = {"truncation": True, "max_length": self.max_seq_length}
        if self.tokenizer.is_fast:
            encodings = encode_heads(self.tokenizer, texts, self.max_seq_length, words=True)
            encodings = self.tokenizer(texts, **options).encodings if encodings is None else encodings
            # None, the word of special tokens, becomes nan
            marked = [(each.ids, np.array(each.word_ids, np.float64)) for each in encodings]
        else:
            marked = [(ids, self._joins(ids)) for ids in self.tokenizer(texts, **options)["input_ids"]]
        # Models reject an empty text, the result of control characters in a tokenizer without special tokens.
        nothing = np.array([self.tokenizer.mask_token_id], np.int32), np.array([-1])
        return [(np.array(ids, np.int32), number_words(mark_T)) if ids else nothing for ids, mark_T in marked]

    def count(self, texts: Sequence[str], vocabulary: int) -> np.ndarray:
        """Count the tokens of texts, without special tokens: (V,) int64, V = `vocabulary`."""
        tokens = [token_T[word_T >= 0] for token_T, word_T in self.tokenize([*texts])]
        return np.bincount(np.concatenate([np.zeros(0, np.int32), *tokens]), minlength=vocabulary)

    def _joins(self, ids: list[int]) -> np.ndarray:
        """Return the `word_ids` for a Python tokenizer, in which all pieces of a word but the first begin with ##."""
        special = {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id, self.tokenizer.mask_token_id}
        pieces = np.array(self.tokenizer.convert_ids_to_tokens(ids), np.str_)
        word_T = (~np.char.startswith(pieces, "##")).cumsum()
        mark_T: np.ndarray = np.where(np.isin(ids, [*special]), np.nan, word_T)
        return mark_T

    def mask(self, token_T: np.ndarray, word_T: np.ndarray, random: np.random.Generator) -> MaskedText:
        """Sample the masks of a text from `tokenize`."""
        tokens = len(token_T)
        size_W = np.bincount(word_T[word_T >= 0])
        encoder, decoder = (
            max(1, round(tokens * share)) for share in (self.encoder_mlm_probability, self.decoder_mlm_probability)
        )
        choices = min(tokens, CHOICES)
        # the first choice is for the encoder
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
        """Return the encoder's input ids for a text with masked tokens."""
        chance_T = random.random(len(token_T))
        other_T = self._words[random.integers(len(self._words), size=len(token_T))]
        shown_T = np.where(masked_T & (chance_T < SHOWN_MASK), self._mask, token_T)
        return np.where(masked_T & (chance_T >= 1 - SHOWN_OTHER), other_T, shown_T)

    @functools.cached_property
    def _mask(self) -> np.int32:
        return np.int32(self.tokenizer.mask_token_id)  # slow: the tokenizer takes longer than the masks of a text

    @functools.cached_property
    def _words(self) -> np.ndarray:
        """All ids except special ones: padding within a text would shift positions in RoBERTa-like models."""
        ids = np.array([*self.tokenizer.get_vocab().values()], np.int32)
        return np.setdiff1d(ids, np.array(self.tokenizer.all_special_ids, np.int32))


def check_mask_token(tokenizer: Any, name: str | None = None) -> None:
    """Raise a UserError that names the tokenizer, or `name`, if it has no mask token."""
    if tokenizer.mask_token_id is None:
        raise UserError(
            f"the tokenizer of {name or tokenizer.name_or_path} has no mask token, which pre-training requires: "
            "use a masked language model, such as BERT or RoBERTa"
        )


def number_words(mark_T: np.ndarray) -> np.ndarray:
    """Number the words of a text from 0: neighbors with the same mark are one word; nan (no word) becomes -1."""
    ordinary_T = ~np.isnan(mark_T)
    first_T = ordinary_T & (mark_T != np.concatenate([[np.nan], mark_T[:-1]]))
    word_T = np.where(ordinary_T, first_T.cumsum() - 1, -1)
    if ordinary_T.any():
        first_T |= ordinary_T & (np.bincount(word_T[ordinary_T])[word_T] > LONGEST_WORD)
    return np.where(ordinary_T, first_T.cumsum() - 1, -1)


def draw_words(size_W: np.ndarray, budget_R: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Sample R choices of a text's words as RetroMAE samples one.

    Words are visited in random order, and each that still fits the choice's budget of tokens is taken.

    Args:
        size_W: tokens of each word.
        budget_R: tokens of each choice.
        random: random numbers.

    Returns:
        (R, W) bool.
    """
    choices, words = len(budget_R), len(size_W)
    if not words:
        return np.zeros((choices, 0), bool)
    # the low bits of each word's random number are the word's own number, which is sorted with it
    low = np.uint32((1 << (words - 1).bit_length()) - 1)
    raw = random.bit_generator.random_raw((choices * words + 1) // 2).view(np.uint32)
    key_RW = raw[: choices * words].reshape(choices, words)
    key_RW &= ~low
    key_RW |= np.arange(words, dtype=np.uint32)
    sorted_RW = np.sort(key_RW, axis=1)
    # a word has at least one token, so a choice has at most as many words as tokens
    filled_RW = size_W.take(sorted_RW[:, : budget_R.max()] & low, mode="clip").cumsum(axis=1)
    taken_R = (filled_RW <= budget_R[:, None]).sum(axis=1)
    rows_R, last_R = np.arange(choices), np.maximum(taken_R - 1, 0)
    chosen_RW: np.ndarray = key_RW <= sorted_RW[rows_R, last_R][:, None]
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
    """Add, in place, the words that still fit after the first that did not, STRETCH words at a time."""
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
        fitting, first = fits.any(axis=1), fits.argmax(axis=1)
        word = word[np.arange(len(word)), first]
        chosen_RW[rows[fitting], word[fitting]] = True
        left = left - np.where(fitting, size_W[word], 0)
        at = at + np.where(fitting, first + 1, STRETCH)


def _of_tokens(chosen_RW: np.ndarray, word_T: np.ndarray) -> np.ndarray:
    """Return the tokens of the chosen words, (R, T) bool; False for special tokens."""
    none_R1 = np.zeros((len(chosen_RW), 1), bool)  # the column of -1
    chosen_RT: np.ndarray = np.concatenate([chosen_RW, none_R1], axis=1).take(word_T, axis=1)
    return chosen_RT


def _joined(arrays: list[np.ndarray]) -> np.ndarray | list[Any]:
    return np.concatenate(arrays) if arrays else []


def unpack_masked(table: pa.Table) -> MaskedBatch:
    """Return the MaskedBatch of a table of one row."""
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
