"""Sample rows in all supported file formats, and a reference reader that uses only the standard library."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from raybge.data.jsonl import BadRow, Row, SourceFile, cut, read_block

ROWS: list[dict[str, Any]] = [
    {"query": "what is é 日本 🙂?", "pos": ["one", "two"], "id": 1, "score": 0.10},
    {"query": "q2", "pos": ["x" * 700], "neg": [], "id": 2, "score": 2.0},
    {"query": "line\nfeed \u2028 and\\n", "pos": ["żółw"], "neg": ["n"], "id": 3, "score": 3.5},
    {"query": "q4", "pos": ["p"], "neg": None, "id": 2**53 + 1, "score": None},
]


def plain_loop(data: bytes) -> list[tuple[int, int, dict]]:
    """Return (offset, 1-based line number, object) of each row, by the standard library only."""
    rows, offset = [], 0
    for line, raw in enumerate(io.BytesIO(data), start=1):
        text = raw.decode("utf-8-sig" if offset == 0 else "utf-8").strip()
        if text:
            rows.append((offset, line, json.loads(text)))
        offset += len(raw)
    return rows


def anything(raw: dict) -> dict:
    """Accept any row: a parser without checks."""
    return raw


def read_all(files: list[SourceFile], block_bytes: int, parse: Callable = anything) -> list[list[Row | BadRow]]:
    return [list(read_block(files, block, parse)) for block in cut(files, block_bytes)]


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def lines_of(rows: list[dict], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


PLAIN = lines_of(ROWS)


CONTENTS = {
    "plain": PLAIN,
    "no final newline": PLAIN.rstrip(b"\n"),
    "crlf": lines_of(ROWS, "\r\n"),
    "blank lines": b"\n  \n" + PLAIN.replace(b"\n", b"\n\r\n\t\n\n"),
    "bom": b"\xef\xbb\xbf" + PLAIN,
    "bom before a blank line": b"\xef\xbb\xbf\r\n" + PLAIN,
    "one line": lines_of(ROWS[:1]),
    "many": PLAIN * 40,
}


def as_zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACKED: dict[str, Callable[[Path], Path]] = {
    "gzip": lambda folder: put(folder / "a.jsonl.gz", gzip.compress(PLAIN)),
    "gzip of two members": lambda folder: put(
        folder / "b.jsonl.gz", gzip.compress(PLAIN[:50]) + gzip.compress(PLAIN[50:])
    ),
    "zstd": lambda folder: put(folder / "a.jsonl.zst", as_zstd(PLAIN)),
    "array": lambda folder: put(folder / "a.json", json.dumps(ROWS, ensure_ascii=False)),
    "array, indented, escaped": lambda folder: put(folder / "b.json", "\ufeff \r\n " + json.dumps(ROWS, indent=3)),
    "lines in .json": lambda folder: put(folder / "c.json", b"\n" + PLAIN),
}


GOOD = b'{"query": "q", "pos": "p"}\n'
