"""Some texts from all parts of the data, where something has to be known of them before they are read."""

import numpy as np

from raybge.data.jsonl import Parse, Row, read_block
from raybge.data.mixture import generator
from raybge.data.survey import Survey

CHARACTERS = 1 << 21  # of all texts together: some 300,000 words
PARTS = 64  # blocks of which each may have its share
MOST = 256  # blocks that are opened, where those hold less


def sample_texts(survey: Survey, parse: Parse, longest: int, characters: int = CHARACTERS) -> list[str]:
    """The first texts of blocks chosen at random, the same for the same data. Weights of data sets do not count.

    Args:
        parse: makes a text of a row.
        longest: characters of a text; what is beyond is cut off.
        characters: of all texts together, where there are so many; exceeded by one text at most.
    """
    texts: list[str] = []
    share, room = characters / PARTS, characters
    for block in generator("sample", len(survey.blocks)).permutation(np.flatnonzero(survey.rows))[:MOST]:
        least = max(0, room - share)
        for row in read_block(survey.files, survey.blocks[block], parse):
            if room <= least:
                break
            if isinstance(row, Row):
                texts.append(row.value[:longest])
                room -= len(texts[-1])
        if room <= 0:
            break
    return texts
