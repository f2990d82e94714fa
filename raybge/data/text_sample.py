"""Sample texts from all parts of the data, for statistics that are needed before training."""

import itertools
from typing import Any

import numpy as np

from raybge.data.groups import Group
from raybge.data.jsonl import Parse, Row, read_block
from raybge.data.mixture import generator
from raybge.data.survey import Survey

CHARACTERS = 1 << 21  # total length of the sample: about 300,000 words
PARTS = 64  # blocks that share the sample evenly
MOST = 256  # most blocks that are opened if those have fewer characters


def sample_texts(
    survey: Survey, parse: Parse, longest: int, characters: int = CHARACTERS, parts: int = PARTS
) -> list[str]:
    """Return the first texts of random blocks, the same for the same data; weights of data sets are ignored.

    Args:
        survey: the surveyed data.
        parse: makes a text or a group of a row; of a group, the query and a positive are taken.
        longest: characters at which a text is cut.
        characters: total length, if the data has as much; exceeded by one text at most.
        parts: blocks that share the sample evenly, each of which is read.

    Returns:
        The texts.
    """
    texts: list[str] = []
    share, room = characters / parts, characters
    for block in generator("sample", len(survey.blocks)).permutation(np.flatnonzero(survey.rows))[:MOST]:
        least = max(0, room - share)
        for row in read_block(survey.files, survey.blocks[block], parse):
            if room <= least:
                break
            if isinstance(row, Row):
                texts.append(_text(row.value)[:longest])
                room -= len(texts[-1])
        if room <= 0:
            break
    return texts


def sample_values(survey: Survey, parse: Parse, count: int = 1000) -> list[Any]:
    """Return the values of the first rows of random blocks, the same for the same data.

    Args:
        survey: the surveyed data.
        parse: makes the value of a row.
        count: largest number of values; if the data has no more rows, all of them.

    Returns:
        The values.
    """
    blocks = generator("sample", len(survey.blocks)).permutation(np.flatnonzero(survey.rows))
    if survey.total_rows > count:
        blocks = blocks[:PARTS]
    share = -(-count // max(1, len(blocks))) if survey.total_rows > count else count
    values: list[Any] = []
    for block in blocks:
        rows = (row.value for row in read_block(survey.files, survey.blocks[block], parse) if isinstance(row, Row))
        values += itertools.islice(rows, share)
    return values[:count]


def _text(value: str | Group) -> str:
    return " ".join((value.query, *value.pos[:1])) if isinstance(value, Group) else value
