"""Some rows from all parts of the data, where something has to be known of it before it is read."""

from collections.abc import Sequence

import numpy as np

from raybge.data.jsonl import Parse, Row, read_block
from raybge.data.survey import Survey

PARTS = 32  # blocks that are opened
CHARACTERS = 1 << 20  # of all texts: some 200,000 words


def sample_texts(survey: Survey, parse: Parse, longest: int, characters: int = CHARACTERS) -> Sequence[str]:
    """The first texts of blocks that are evenly spread over the data, the same for the same data.

    Args:
        parse: makes a text of a row.
        longest: characters of a text; what is beyond is cut off.
        characters: of all texts together, exceeded by the last text of each block at most.
    """
    filled = np.flatnonzero(survey.rows)
    chosen = np.unique(filled[np.linspace(0, len(filled) - 1, PARTS).round().astype(int)])
    texts: list[str] = []
    for block in chosen:
        room = characters // len(chosen)
        for row in read_block(survey.files, survey.blocks[block], parse):
            if room <= 0:
                break
            if isinstance(row, Row):
                texts.append(row.value[:longest])
                room -= len(texts[-1])
    return texts
