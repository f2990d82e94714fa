"""Encoding: raybge.Encoder against sentence-transformers, and the memory of `raybge.encode`.

    python benchmarks/encoding.py --out runs/bench/encoding.json
    python benchmarks/encoding.py --rows 2000
    python benchmarks/encoding.py memory --out runs/bench/encoding-memory.json

speed: on medquad's passages (at most 256 tokens, all-MiniLM-L6-v2, fp32), `raybge.Encoder` is at least 1.15 times as
fast as `SentenceTransformer.encode` as it comes (batches of 32; `--batch_size` for others). Tokenizing is inside the
clock for both, loading outside. The passages go to both in `--parts` parts, in turn, so that whatever else the machine
does meets both. The script stops unless their vectors agree.

memory: `raybge.encode` of --rows short texts to Parquet, and of four times as many, with an embedder of fixed vectors
(the stub of the tests, 384 numbers): no process is larger by 15% with four times the texts. Resident memory as `ps` has
it, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

CLAIM = 1.15
LENGTH = 256
TOLERANCE = 1e-5  # of unit vectors in fp32, padded and batched in two ways
GROWTH, TIMES, TEXTS = 1.15, 4, 250_000


def speed(texts: list[str], batch_size: int, parts: int, threads: int) -> dict[str, Any]:
    import torch
    from sentence_transformers import SentenceTransformer

    from raybge import Encoder

    torch.set_num_threads(threads)
    ours = Encoder(common.minilm(), devices="cpu", passage_max_length=LENGTH)
    peer = SentenceTransformer(common.minilm(), device="cpu")
    peer.max_seq_length = LENGTH
    encode = {
        "raybge": lambda part: ours.encode_corpus(part, show_progress_bar=False),
        "sentence-transformers": lambda part: peer.encode(part, batch_size=batch_size, show_progress_bar=False),
    }
    for each in encode.values():
        each(texts[:64])  # what is done at the first call alone
    seconds = dict.fromkeys(encode, 0.0)
    apart = 0.0
    for number in range(parts):
        part = texts[number::parts]
        found = {}
        for name in list(encode)[:: 1 if number % 2 else -1]:
            start = time.monotonic()
            found[name] = encode[name](part)
            seconds[name] += time.monotonic() - start
        apart = max(apart, float(np.abs(found["raybge"] - found["sentence-transformers"]).max()))
        rates = ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items())
        print(f"part {number + 1} of {parts}: {rates}", flush=True)
    if apart > TOLERANCE:
        raise SystemExit(f"the vectors differ by {apart:.2g}")
    ratio = seconds["sentence-transformers"] / seconds["raybge"]
    for name, spent in seconds.items():
        print(f"{name}: {len(texts) / spent:.1f} passages/s")
    print(f"raybge is {ratio:.2f} times as fast (claim: at least {CLAIM})")
    return {
        "passages": len(texts),
        "seconds": {name: round(spent, 2) for name, spent in seconds.items()},
        "ratio": round(ratio, 3),
        "holds": ratio >= CLAIM,
    }


def encode_stub(folder: str) -> None:
    """`raybge.encode` with the stub, in this process."""
    import stub

    from raybge.cli.console import Console
    from raybge.cli.options import EncodeOptions
    from raybge.cli.parser import build_options
    from raybge.encoding.run import encode

    files = {"input_file": f"{folder}/texts.jsonl", "output_file": f"{folder}/vectors.parquet"}
    encode(build_options(EncodeOptions, {"model_name_or_path": "", **files}), Console(), stub.embedder(dim=384))


def memory(rows: int) -> dict[str, Any]:
    tests = str(Path(__file__).resolve().parents[1] / "tests" / "support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    found = {}
    for count in (rows, TIMES * rows):
        with tempfile.TemporaryDirectory() as folder:
            with open(f"{folder}/texts.jsonl", "w") as texts:
                texts.writelines(f'{{"text": "text {i} of a corpus that holds many of them"}}\n' for i in range(count))
            driver = subprocess.Popen([sys.executable, __file__, "stub", "--folder", folder], env=environment)
            found[count] = common.peaks(driver)
    few, many = found.values()
    for name in sorted(many, key=lambda name: -many[name]):
        print(f"{few.get(name, 0) / 1e6:8,.0f} MB {many[name] / 1e6:8,.0f} MB  {name}")
    growth = max(
        size / few[name] for name, size in many.items() if (name in few and "ray::" in name) or name == "driver"
    )
    print(f"with {TIMES} times as many texts a process has {growth:.2f} times the memory (claim: at most {GROWTH})")
    peaks = {count: {name: round(size / 1e6) for name, size in each.items()} for count, each in found.items()}
    return {"peak_mb": peaks, "growth": round(growth, 3), "holds": growth <= GROWTH}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("part", nargs="?", choices=("speed", "memory", "stub"), default="speed")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--data", default=common.medquad("corpus.jsonl.gz"), help="passages; left out: medquad's")
    parser.add_argument("--rows", type=int, help="so many passages; left out: all")
    parser.add_argument("--batch_size", type=int, default=32, help="of sentence-transformers")
    parser.add_argument("--parts", type=int, default=4)
    args = parser.parse_args()
    if args.part == "stub":
        encode_stub(args.folder)
        return
    if args.part == "memory":
        result = memory(args.rows or TEXTS)
    else:
        texts = [row["text"] for row in common.rows(args.data, args.rows)]
        result = speed(texts, args.batch_size, args.parts, args.threads)
    common.keep(result, args.out)
    if not result["holds"]:
        raise SystemExit("the claim does not hold")


if __name__ == "__main__":
    main()
