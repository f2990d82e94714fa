"""From a step's rows to tokens: draw each group's passages, shuffle what is to be shuffled, tokenise.

This runs where the rows are read, so the training process receives token ids and never waits for a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from raybge.data.groups import Group, parse_group, parse_scored_group, short_key
from raybge.data.jsonl import Parse, Row
from raybge.data.mixture import generator
from raybge.data.step_batch import Groups, StepBatch
from raybge.data.tokenize import TextTokenizer

LONG = 100  # characters above which a positive may be shuffled, as in the recipe

# A step's share is one row; see StepBatch. A column that was not asked for is null.
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("file", pa.list_(pa.int32())),
        ("offset", pa.list_(pa.int64())),
        ("passages", pa.list_(pa.int64())),
        ("passage_keys", pa.list_(pa.int64())),
        ("known", pa.list_(pa.int64())),
        ("known_keys", pa.list_(pa.int64())),
        ("alone", pa.list_(pa.bool_())),
        ("lengths", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.int32())),
        ("teacher", pa.list_(pa.float32())),
        ("guide_lengths", pa.list_(pa.int32())),
        ("guide_tokens", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class GroupTokenizer:
    """Draws and tokenises the passages of groups.

    Args:
        texts: the model's way from texts to tokens.
        group_size: passages a group, one positive and the rest negatives.
        seed: of the draw, together with epoch and row.
        shuffle_ratio: share of the long positives whose three parts are put into another order.
        alone: files whose queries see their own group only.
        scored: the groups carry a teacher's scores, and the batch is to have them.
        guide: a second model's way to tokens; the batch then has those too.
    """

    texts: TextTokenizer
    group_size: int
    seed: int
    shuffle_ratio: float = 0.0
    alone: frozenset[int] = frozenset()
    scored: bool = False
    guide: TextTokenizer | None = None
    schema: ClassVar[pa.Schema] = SCHEMA

    @property
    def parse(self) -> Parse:
        """Of a row, as a stream asks for it."""
        return parse_scored_group if self.scored else parse_group

    def unpack(self, table: pa.Table) -> StepBatch:
        """As a stream asks for it."""
        return unpack(table)

    def __call__(self, epoch: int, step: int, rows: Sequence[Row], copies: Sequence[int] | None = None) -> pa.Table:
        """The share of a step as a table of one row (see SCHEMA); no rows give empty lists.

        `copies`: which of its appearances in the epoch each row's is, counted from 0; each draws anew.
        """
        queries: list[tuple[str, str | None]] = []
        passages: list[str] = []
        keys: list[int] = []
        sizes: list[int] = []
        teacher: list[float] = []
        for row, copy in zip(rows, copies or [0] * len(rows), strict=True):
            group: Group = row.value
            random = generator("draw", self.seed, epoch, row.file, row.offset, copy)
            positive, negatives = draw(len(group.pos), len(group.neg), self.group_size, random)
            texts = [group.pos[positive], *(group.neg[i] for i in negatives)]
            keys += map(short_key, texts)
            sizes.append(len(texts))
            if self.scored:
                teacher += [group.pos_scores[positive], *(group.neg_scores[i] for i in negatives)]
            texts[0] = shuffle_parts(texts[0], self.shuffle_ratio, random)
            queries.append((group.query, group.prompt))
            passages += texts
        lengths, tokens = self.texts(queries, passages)
        guide_lengths, guide_tokens = self.guide(queries, passages) if self.guide else (None, None)
        columns = dict(
            file=[row.file for row in rows],
            offset=[row.offset for row in rows],
            passages=sizes,
            passage_keys=keys,
            known=[len(row.value.pos) for row in rows],
            known_keys=[short_key(text) for row in rows for text in row.value.pos],
            alone=[row.file in self.alone for row in rows],
            lengths=lengths,
            tokens=tokens,
            teacher=teacher if self.scored else None,
            guide_lengths=guide_lengths,
            guide_tokens=guide_tokens,
        )
        return pa.table({"step": [step], **{name: [values] for name, values in columns.items()}}, schema=SCHEMA)


def draw(positives: int, negatives: int, size: int, random: np.random.Generator) -> tuple[int, list[int]]:
    """Which positive, and which `size` - 1 negatives, of a group that has so many.

    A negative comes twice only after all have come; a group without negatives gives its positive alone.
    """
    positive = int(random.integers(positives))
    drawn: list[int] = []
    while negatives and len(drawn) < size - 1:
        drawn += random.permutation(negatives)[: size - 1 - len(drawn)].tolist()
    return positive, drawn


def shuffle_parts(text: str, ratio: float, random: np.random.Generator) -> str:
    """A share `ratio` of the texts above 100 characters with their three parts in random order, as in the recipe."""
    if not ratio or len(text) <= LONG or random.random() >= ratio:
        return text
    size = len(text) // 3 + 1
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    return " ".join(parts[i] for i in random.permutation(len(parts)))


def unpack(table: pa.Table) -> StepBatch:
    """The StepBatch of a table of one row."""
    column = {name: column_values(table, name) for name in SCHEMA.names[1:]}
    scored, guided = (table.column(name)[0].is_valid for name in ("teacher", "guide_tokens"))
    return StepBatch(
        step=table.column("step")[0].as_py(),
        rows=list(zip(column["file"].tolist(), column["offset"].tolist(), strict=True)),
        token_ids=split_texts(column["tokens"], column["lengths"]),
        groups=Groups(
            passages_B=column["passages"],
            alone_B=column["alone"],
            passage_key_M=column["passage_keys"],
            known_B=column["known"],
            known_key_R=column["known_keys"],
            teacher_score_M=column["teacher"] if scored else None,
        ),
        guide_ids=split_texts(column["guide_tokens"], column["guide_lengths"]) if guided else None,
    )


def column_values(table: pa.Table, name: str) -> np.ndarray:
    """The list in a column as an array of its own: one that can be written to, as torch wants, and that does not hold
    Ray's memory. Empty where the column is null.
    """
    values = table.column(name)[0].values
    return np.zeros(0) if values is None else values.to_numpy(zero_copy_only=False).copy()


def split_texts(tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """What lies one text after the other, text by text."""
    return np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []
