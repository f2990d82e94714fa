"""Embedder of fixed vectors, for mining without a model; as a script, mining with it.

    python tests/support/stub.py LOG SECONDS --input_file groups.jsonl --output_file mined.jsonl ...

Each encoded block adds a line to the file LOG: `digest_of` its texts. Each call of a search actor adds `search` or
`texts`. Each takes SECONDS.
"""

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from raybge.data.prompts import Instructions
from raybge.search.embedder import Embedder
from raybge.search.shards import ShardSearcher

DIM = 32
BLOCK_BYTES = 1500  # about twenty texts; used by the script


def digest_of(texts: Sequence[str]) -> str:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()


class StubEncoder:
    """Encoder whose vector is a hash of the text. Pickled by name, so that Ray's workers find it."""

    def __init__(self, log: str | None, seconds: float, dim: int, device: str) -> None:
        self._log, self._seconds, self._dim = log, seconds, dim
        self.instructions = Instructions(query="", passage="")

    def encode_corpus(self, texts: Sequence[str], convert_to_numpy: bool = True) -> np.ndarray:
        if self._log:
            log_call(self._log, digest_of(texts), self._seconds)
        raw = b"".join(hashlib.blake2b(text.encode(), digest_size=DIM).digest() for text in texts)
        vectors_ND = np.tile(np.frombuffer(raw, np.int8).reshape(-1, DIM).astype(np.float32), self._dim // DIM)
        return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-6)

    encode_queries = encode_corpus


class CoarseEncoder(StubEncoder):
    """Encoder whose vectors are those of `StubEncoder` with one bit per number; their inner products are exact."""

    def encode_corpus(self, texts: Sequence[str], convert_to_numpy: bool = True) -> np.ndarray:
        return np.where(super().encode_corpus(texts) > 0, 0.125, -0.125).astype(np.float32)

    encode_queries = encode_corpus


class SlowShardSearcher(ShardSearcher):
    """ShardSearcher that logs its calls and delays them, as configured by environment variables."""

    def search(self, *arguments):
        log_call(os.environ["STUB_LOG"], "search", float(os.environ["STUB_SECONDS"]))
        return super().search(*arguments)

    def texts(self, *arguments):
        log_call(os.environ["STUB_LOG"], "texts", float(os.environ["STUB_SECONDS"]))
        return super().texts(*arguments)


def log_call(log: str, line: str, seconds: float) -> None:
    file = os.open(log, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(file, f"{line}\n".encode())
    os.close(file)
    time.sleep(seconds)


def embedder(log: str | Path | None = None, seconds: float = 0.0, dim: int = DIM) -> Embedder:
    """Return an embedder that takes `seconds` per block."""
    return Embedder(partial(StubEncoder, log and str(log), seconds, dim), "stub", dim)


def coarse_embedder() -> Embedder:
    """Return an embedder of `CoarseEncoder`."""
    return Embedder(partial(CoarseEncoder, None, 0.0, DIM), "coarse", DIM)


def main() -> int:
    import stub  # by its name: a class of __main__ is another class in a worker

    from raybge.cli.options import MineOptions
    from raybge.cli.run import run_command
    from raybge.mining.run import mine
    from raybge.search import index, inputs

    inputs.BLOCK_BYTES = BLOCK_BYTES
    index.ShardSearcher = stub.SlowShardSearcher
    log, seconds, *argv = sys.argv[1:]
    os.environ |= {"STUB_LOG": log, "STUB_SECONDS": seconds}
    return run_command(MineOptions, partial(mine, embedder=stub.embedder(log, float(seconds))), "mine", argv)


if __name__ == "__main__":
    raise SystemExit(main())
