"""Make a training step's batch from its rows: sample passages, shuffle long positives, tokenize.

This runs in the reading tasks, so the training process receives token ids and never waits for a tokenizer.
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

LONG = 100  # characters above which a positive may be shuffled, as in FlagEmbedding

# One worker's share of a step is one row, see StepBatch. A column that is not needed is null.
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("file", pa.list_(pa.int32())),
        ("offset", pa.list_(pa.int64())),
        ("passages", pa.list_(pa.int64())),
        ("query_keys", pa.list_(pa.int64())),
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
    """Samples and tokenizes the passages of groups.

    Args:
        texts: the model's tokenizer.
        group_size: passages per group: one positive, the rest negatives.
        seed: seed of the sampling, together with epoch and row.
        shuffle_ratio: share of the long positives whose three parts are reordered.
        alone: files whose queries are compared with their own group only.
        scored: groups have teacher scores, which the batch needs.
        guide: tokenizer of a guide model, whose token ids the batch needs too.
        schema: schema of the tables.
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
        """Function that parses a row."""
        return parse_scored_group if self.scored else parse_group

    def unpack(self, table: pa.Table) -> StepBatch:
        """Return the batch of a table of one row."""
        return unpack(table)

    def __call__(self, epoch: int, step: int, rows: Sequence[Row], copies: Sequence[int] | None = None) -> pa.Table:
        """Return one worker's share of a step as a table of one row (see SCHEMA).

        Args:
            epoch: number of the epoch.
            step: number of the step within the epoch.
            rows: the groups; may be empty.
            copies: for each row how often the epoch had it before; each copy samples other passages. Default: 0.

        Returns:
            The table.
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
            query_keys=[short_key(query) for query, _ in queries],
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
    """Sample one positive and `size` - 1 negatives by their index.

    A negative is repeated only after all have been used; a group without negatives gets its positive only.

    Args:
        positives: number of positives in the group.
        negatives: number of negatives in the group.
        size: passages to sample.
        random: random numbers.

    Returns:
        The positive, and the negatives.
    """
    positive = int(random.integers(positives))
    drawn: list[int] = []
    while negatives and len(drawn) < size - 1:
        drawn += random.permutation(negatives)[: size - 1 - len(drawn)].tolist()
    return positive, drawn


def shuffle_parts(text: str, ratio: float, random: np.random.Generator) -> str:
    """Reorder the three parts of a share `ratio` of the texts above 100 characters, as in FlagEmbedding."""
    if not ratio or len(text) <= LONG or random.random() >= ratio:
        return text
    size = len(text) // 3 + 1
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    return " ".join(parts[i] for i in random.permutation(len(parts)))


def unpack(table: pa.Table) -> StepBatch:
    """Return the StepBatch of a table of one row."""
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
            query_key_B=column["query_keys"],
        ),
        guide_ids=split_texts(column["guide_tokens"], column["guide_lengths"]) if guided else None,
    )


def column_values(table: pa.Table, name: str) -> np.ndarray:
    """Return the list in a column of one row as a new array; empty if the column is null.

    torch needs a writable array, and a view would keep Ray's shared memory alive.
    """
    values = table.column(name)[0].values
    array: np.ndarray = np.zeros(0) if values is None else values.to_numpy(zero_copy_only=False).copy()
    return array


def split_texts(tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Split the concatenated tokens of several texts into one array per text."""
    return np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []
