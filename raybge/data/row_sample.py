"""Sample of the training rows for the model card: examples, and the lengths of their texts in tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from raybge.data.groups import Group
from raybge.data.jsonl import Parse, Row, read_block
from raybge.data.survey import Survey

ROWS = 1000  # of the sample
BLOCKS = 8  # that the sample is taken from, evenly spaced over the files
EXAMPLES = 3
LONGEST = 20_000  # characters of a text that are tokenized


@dataclass(frozen=True)
class TextLengths:
    """Lengths in tokens of the texts of one field.

    Args:
        field: "query", "positive", "negative" or "text".
        texts: Number of texts.
        shortest: Length of the shortest one.
        mean: Mean length.
        longest: Length of the longest one.
    """

    field: str
    texts: int
    shortest: int
    mean: float
    longest: int


@dataclass(frozen=True)
class RowSample:
    """Sample of the rows.

    Args:
        rows: Number of rows.
        lengths: Lengths of the texts by field.
        examples: A few rows as one text by field.
    """

    rows: int
    lengths: Sequence[TextLengths]
    examples: Sequence[Mapping[str, str]]


def sample_rows(survey: Survey, parse: Parse, token_counts: Callable[[Sequence[str]], Sequence[int]]) -> RowSample:
    """Read up to ROWS rows from a few blocks and measure their texts; the same for the same data.

    Args:
        survey: The surveyed rows.
        parse: Parses a row to a Group or a text.
        token_counts: Returns the number of tokens of each text, without truncation.

    Returns:
        The sample.
    """
    texts: dict[str, list[str]] = {}
    examples: list[Mapping[str, str]] = []
    rows = 0
    for row in _rows(survey, parse):
        rows += 1
        fields = {name: values for name, values in _fields(row).items() if values}
        if len(examples) < EXAMPLES:
            examples.append({name: values[0] for name, values in fields.items()})
        for name, values in fields.items():
            texts.setdefault(name, []).extend(text[:LONGEST] for text in values)
    lengths = []
    for name, values in texts.items():
        counts = np.array(token_counts(values))
        lengths.append(TextLengths(name, len(counts), int(counts.min()), float(counts.mean()), int(counts.max())))
    return RowSample(rows, lengths, examples)


def _rows(survey: Survey, parse: Parse) -> Iterator[Any]:
    """Yield the values of the first valid rows of evenly spaced blocks."""
    filled = np.flatnonzero(survey.rows)
    chosen = np.unique(filled[np.linspace(0, len(filled) - 1, BLOCKS).astype(int)])
    for number in chosen:
        block = read_block(survey.files, survey.blocks[number], parse)
        valid = (row.value for row in block if isinstance(row, Row))
        yield from islice(valid, -(-ROWS // len(chosen)))


def _fields(value: Any) -> dict[str, Sequence[str]]:
    """Return the texts of a row by field."""
    if isinstance(value, Group):
        return {"query": (value.query,), "positive": value.pos, "negative": value.neg}
    return {"text": (value,)}
