"""Embeddings of a corpus in one file, memory-mapped by other runs: --save_embedding and --load_embedding.

The file is HEADER bytes of JSON, padded with spaces, then the vectors as float32, one row per passage, in the order of
the deduplicated corpus. The header identifies the model and the texts and states their number: a file that does not
match is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from raybge.search.columns import vectors_of
from raybge.search.store import EncodedBlock, Store
from raybge.util import atomic_write
from raybge.util.digest import digest
from raybge.util.errors import UserError

HEADER = 4096
FORMAT = "raybge embeddings 1"


@dataclass(frozen=True)
class SavedEmbeddings:
    """A file of vectors.

    Args:
        path: the file.
        model: digest of everything that a passage's vector depends on.
        texts: digest of all passages.
        rows: number of vectors.
        dim: width of a vector.
    """

    path: str
    model: str
    texts: str
    rows: int
    dim: int

    def vectors(self, start: int, count: int) -> np.ndarray:
        """Return the vectors [start, start + count), (count, D) float32."""
        shape = (self.rows, self.dim)
        return np.array(np.memmap(self.path, np.float32, "r", HEADER, shape)[start : start + count])

    def check(self, model: str, rows: int) -> None:
        """Check model and number of passages.

        Args:
            model: digest of the current model.
            rows: number of passages of the current corpus.

        Raises:
            UserError: they differ from the file's.
        """
        if self.model != model:
            raise UserError(
                f"--load_embedding: {self.path} was saved with another model or other flags (pooling, normalization, "
                "length, precision); encode the corpus again with --save_embedding"
            )
        if self.rows != rows:
            raise UserError(
                f"--load_embedding: {self.path} holds {self.rows:,} passages, but --corpus_data has {rows:,}; encode "
                "the corpus again with --save_embedding"
            )

    def check_texts(self, blocks: Sequence[EncodedBlock]) -> None:
        """Check the texts.

        Args:
            blocks: blocks of the current corpus.

        Raises:
            UserError: the texts differ from the file's.
        """
        if self.texts != _texts_digest(blocks):
            raise UserError(
                f"--load_embedding: {self.path} holds the vectors of other passages than those of --corpus_data; "
                "encode the corpus again with --save_embedding"
            )


def save(path: str, model: str, blocks: Sequence[EncodedBlock], store: Store) -> None:
    """Write the vectors of encoded passages, one block at a time.

    Args:
        path: the file.
        model: digest of the model.
        blocks: encoded passages, in order.
        store: holds the blocks.
    """
    rows = sum(block.rows for block in blocks)
    dim = vectors_of(store.table(blocks[0].name)).shape[1]
    header = {"format": FORMAT, **asdict(SavedEmbeddings("", model, _texts_digest(blocks), rows, dim))}
    with atomic_write.open_atomic(path, "--save_path") as out:
        out.write(json.dumps(header).encode().ljust(HEADER - 1) + b"\n")
        for block in blocks:
            out.write(vectors_of(store.table(block.name)).tobytes())


def load(path: str) -> SavedEmbeddings:
    """Read the header of a file.

    Args:
        path: the file.

    Returns:
        The file's description.

    Raises:
        UserError: the file is missing, has no such header, or is truncated.
    """
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(HEADER))
            if header.pop("format") != FORMAT:
                raise ValueError("unknown format")
            saved = SavedEmbeddings(**{**header, "path": path})
    except OSError as error:
        raise UserError(f"--load_embedding: {path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"--load_embedding: {path} was not written by --save_embedding") from None
    if (size := Path(path).stat().st_size) != HEADER + 4 * saved.rows * saved.dim:
        raise UserError(f"--load_embedding: {path} is truncated: it has {size:,} bytes")
    return saved


def _texts_digest(blocks: Sequence[EncodedBlock]) -> str:
    return digest([block.texts for block in blocks])
