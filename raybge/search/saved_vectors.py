"""A corpus's vectors in one file, for other runs to map: --save_embedding and --load_embedding.

The file is HEADER bytes of JSON, filled up with spaces, then the vectors as float32, a row a passage, in the order of
the corpus without its duplicates. The header says which model made them, of which texts, and how many: what does not
fit is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from raybge.search.shards import vectors_of
from raybge.search.store import Piece, Store, digest
from raybge.util import atomic_write as output
from raybge.util.errors import UserError

HEADER = 4096
FORMAT = "raybge embeddings 1"


@dataclass(frozen=True)
class Embeddings:
    """A file of vectors. `model` and `texts` are hashes: of what makes a passage's vector, and of all passages."""

    path: str
    model: str
    texts: str
    rows: int
    dim: int

    def vectors(self, start: int, count: int) -> np.ndarray:
        """Some of the vectors, (count, D) float32."""
        shape = (self.rows, self.dim)
        return np.array(np.memmap(self.path, np.float32, "r", HEADER, shape)[start : start + count])

    def check(self, model: str, rows: int) -> None:
        """UserError where they are not this model's, or not of so many passages."""
        if self.model != model:
            raise UserError(
                f"--load_embedding: {self.path} was made by another model, or with other flags (pooling, normalising, "
                "length, precision)"
            )
        if self.rows != rows:
            raise UserError(f"--load_embedding: {self.path} is of {self.rows:,} passages, --corpus_data has {rows:,}")

    def check_texts(self, pieces: Sequence[Piece]) -> None:
        """UserError where they are not of these passages."""
        if self.texts != _texts(pieces):
            raise UserError(f"--load_embedding: {self.path} was made of other passages than those of --corpus_data")


def save(path: str, model: str, pieces: Sequence[Piece], store: Store) -> None:
    """Write the vectors of encoded passages, a block at a time."""
    rows = sum(piece.rows for piece in pieces)
    dim = vectors_of(store.table(pieces[0].name)).shape[1]
    about = {"format": FORMAT, **asdict(Embeddings("", model, _texts(pieces), rows, dim))}
    with output.written_aside(path, "--save_path") as out:
        out.write(json.dumps(about).encode().ljust(HEADER - 1) + b"\n")
        for piece in pieces:
            out.write(vectors_of(store.table(piece.name)).tobytes())


def load(path: str) -> Embeddings:
    """The file's header. UserError where it has none, or is not whole."""
    try:
        with open(path, "rb") as file:
            about = json.loads(file.read(HEADER))
            if about.pop("format") != FORMAT:
                raise ValueError("no such format")
            found = Embeddings(**{**about, "path": path})
    except OSError as error:
        raise UserError(f"--load_embedding: {path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"--load_embedding: {path} is no file of --save_embedding") from None
    if (size := Path(path).stat().st_size) != HEADER + 4 * found.rows * found.dim:
        raise UserError(f"--load_embedding: {path} is not whole: it has {size:,} bytes")
    return found


def _texts(pieces: Sequence[Piece]) -> str:
    return digest([piece.texts for piece in pieces])
