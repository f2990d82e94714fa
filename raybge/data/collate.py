"""From a step's rows to tokens: draw each group's passages, put instructions before the texts, tokenise.

This runs where the rows are read, so the training process receives token ids and never waits for a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.data.groups import Group
from raybge.data.jsonl import Row
from raybge.model.folder import Instructions

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("file", pa.list_(pa.int32())),
        ("offset", pa.list_(pa.int64())),
        ("passages", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class StepBatch:
    """One worker's share of a step: B groups with M passages in all.

    `rows`: (file, offset) of each group. `token_ids`: B queries, then M passages, each an array of ids.
    `passages_B`: passages of each group, int64; a group's positive is its first.
    `passage_keys_M`: int64 key of each passage's text. `known_B`: how many positives the file knows of each query;
    `known_keys`: their text keys, one query after the other. `alone_B`: whether the query sees its own group only.
    `teacher_M`: a teacher's score of each passage, fp32. `guide_ids`: as `token_ids`, for the guide model.
    """

    step: int
    rows: list[tuple[int, int]]
    token_ids: list[np.ndarray]
    passages_B: np.ndarray
    passage_keys_M: np.ndarray | None = None
    known_B: np.ndarray | None = None
    known_keys: np.ndarray | None = None
    alone_B: np.ndarray | None = None
    teacher_M: np.ndarray | None = None
    guide_ids: list[np.ndarray] | None = None


@dataclass(frozen=True)
class GroupTokenizer:
    """Draws and tokenises the passages of groups.

    Args:
        tokenizer: of transformers.
        instructions: what goes before queries and passages; a row's own prompt replaces the query's.
        group_size: passages a group, one positive and the rest negatives.
        query_max_len, passage_max_len: in tokens, special ones included.
        seed: of the draw, together with epoch and row.
    """

    tokenizer: Any
    instructions: Instructions
    group_size: int
    query_max_len: int
    passage_max_len: int
    seed: int

    def __call__(self, epoch: int, step: int, rows: Sequence[Row]) -> pa.Table:
        """The share of a step as a table of one row (see SCHEMA); no rows give empty lists."""
        queries, passages, sizes = [], [], []
        for row in rows:
            group: Group = row.value
            drawn = draw(group, self.group_size, (self.seed, epoch, row.file, row.offset))
            queries.append(self.instructions.query_text(group.query, group.prompt))
            passages += [self.instructions.passage_text(text) for text in drawn]
            sizes.append(len(drawn))
        ids = self._tokenize(queries, self.query_max_len) + self._tokenize(passages, self.passage_max_len)
        columns = {
            "step": [step],
            "file": [[row.file for row in rows]],
            "offset": [[row.offset for row in rows]],
            "passages": [sizes],
            "lengths": [[len(each) for each in ids]],
            "tokens": [[token for each in ids for token in each]],
        }
        return pa.table(columns, schema=SCHEMA)

    def _tokenize(self, texts: list[str], max_length: int) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts,
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]


def draw(group: Group, size: int, seed: tuple[int, ...]) -> list[str]:
    """One positive and `size` - 1 negatives of a group; the draw depends on `seed` alone.

    A negative comes twice only after all have come; a group without negatives gives its positive alone.
    """
    random = np.random.default_rng(seed)
    drawn = [group.pos[random.integers(len(group.pos))]]
    while group.neg and len(drawn) < size:
        order = random.permutation(len(group.neg))[: size - len(drawn)]
        drawn += [group.neg[i] for i in order]
    return drawn


def unpack(table: pa.Table) -> StepBatch:
    """The StepBatch of a table of one row."""
    column = {name: table.column(name).combine_chunks() for name in SCHEMA.names}
    flat = {name: column[name].flatten().to_numpy() for name in SCHEMA.names if name != "step"}
    ends = np.cumsum(flat["lengths"])
    return StepBatch(
        step=column["step"][0].as_py(),
        rows=list(zip(flat["file"].tolist(), flat["offset"].tolist(), strict=True)),
        token_ids=np.split(flat["tokens"], ends[:-1]) if len(ends) else [],
        passages_B=flat["passages"].astype(np.int64),
    )
