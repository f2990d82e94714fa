"""Encoding: raybge.Encoder against sentence-transformers, and the memory of `raybge.encode`.

    python benchmarks/encoding.py --out runs/bench/encoding.json
    python benchmarks/encoding.py --rows 2000
    python benchmarks/encoding.py memory --out runs/bench/encoding-memory.json
    python benchmarks/encoding.py backends --out runs/bench/encoding-backends.json

speed: on medquad's passages (at most 256 tokens, all-MiniLM-L6-v2, fp32), `raybge.Encoder` is at least 1.15 times as
fast as `SentenceTransformer.encode` with its defaults (batches of 32; `--batch_size` for others). The time includes
tokenizing and excludes loading. Both encode the passages in `--parts` parts, alternately, so that other load on the
machine affects both. The script stops if their vectors differ.

backends: all backends and precisions, against sentence-transformers as it comes, with bf16 weights and, where
`--onnx_python` and `--openvino_python` name interpreters that have optimum, by its own int8 backends (see
encoding_backends.py). CPU seconds, since CPUs and their load differ.

memory: `raybge.encode` of --rows short texts to Parquet, and of four times as many, with an embedder of fixed vectors
(the stub of the tests, 384 numbers): no process is larger by 15% with four times the texts. Memory is the
resident size that `ps` reports, pages of mapped files included.
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
TOLERANCE = 1e-5  # for unit vectors in fp32 that were padded and batched differently
BACKEND_TEXTS, SAMPLES = 256, 512
GROWTH, TIMES, TEXTS = 1.15, 4, 250_000


def speed(texts: list[str], batch_size: int, parts: int, threads: int) -> dict[str, Any]:
    """Measure the seconds of both encoders on the same texts; stop if their vectors differ."""
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
        each(texts[:64])  # excludes the first call's preparations from the measurement
    seconds = dict.fromkeys(encode, 0.0)
    difference = 0.0
    for number in range(parts):
        part = texts[number::parts]
        vectors = {}
        for name in list(encode)[:: 1 if number % 2 else -1]:
            start = time.monotonic()
            vectors[name] = encode[name](part)
            seconds[name] += time.monotonic() - start
        difference = max(difference, float(np.abs(vectors["raybge"] - vectors["sentence-transformers"]).max()))
        rates = ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items())
        print(f"part {number + 1} of {parts}: {rates}", flush=True)
    if difference > TOLERANCE:
        raise SystemExit(f"the vectors differ by {difference:.2g}")
    ratio = seconds["sentence-transformers"] / seconds["raybge"]
    for name, spent in seconds.items():
        print(f"{name}: {len(texts) / spent:.1f} passages/s")
    print(f"raybge is {ratio:.2f} times as fast (claim: at least {CLAIM})")
    return {
        "passages": len(texts),
        "seconds": {name: round(spent, 2) for name, spent in seconds.items()},
        "ratio": round(ratio, 3),
    }


def encode_stub(folder: str) -> None:
    """Run `raybge.encode` with the stub in this process."""
    import stub

    from raybge.cli.console import Console
    from raybge.cli.options import EncodeOptions
    from raybge.cli.parser import build_options
    from raybge.encoding.run import encode

    files = {"input_file": f"{folder}/texts.jsonl", "output_file": f"{folder}/vectors.parquet"}
    encode(build_options(EncodeOptions, {"model_name_or_path": "", **files}), Console(), stub.embedder(dim=384))


def memory(rows: int) -> dict[str, Any]:
    """Measure the peak memory of every process of `raybge.encode` for `rows` and for TIMES as many texts."""
    tests = str(Path(__file__).resolve().parents[1] / "tests" / "support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    sizes = {}
    for count in (rows, TIMES * rows):
        with tempfile.TemporaryDirectory() as folder:
            with open(f"{folder}/texts.jsonl", "w") as texts:
                texts.writelines(f'{{"text": "text {i} of a corpus that holds many of them"}}\n' for i in range(count))
            driver = subprocess.Popen([sys.executable, __file__, "stub", "--folder", folder], env=environment)
            sizes[count] = common.peaks(driver)
    few, many = sizes.values()
    for name in sorted(many, key=lambda name: -many[name]):
        print(f"{few.get(name, 0) / 1e6:8,.0f} MB {many[name] / 1e6:8,.0f} MB  {name}")
    growth = max(
        size / few[name] for name, size in many.items() if (name in few and "ray::" in name) or name == "driver"
    )
    print(f"with {TIMES} times as many texts a process has {growth:.2f} times the memory (claim: at most {GROWTH})")
    peaks = {count: {name: round(size / 1e6) for name, size in each.items()} for count, each in sizes.items()}
    return {"peak_mb": peaks, "growth": round(growth, 3)}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("part", nargs="?", choices=("speed", "memory", "backends", "stub"), default="speed")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--data", default=common.medquad("corpus.jsonl.gz"), help="passages; default: medquad's")
    parser.add_argument("--rows", type=int, help="number of passages; default: all")
    parser.add_argument("--batch_size", type=int, default=32, help="batch size of sentence-transformers")
    parser.add_argument("--parts", type=int, default=4)
    for backend in ("onnx", "openvino"):
        parser.add_argument(
            f"--{backend}_python", help=f"interpreter that has sentence-transformers' {backend} backend"
        )
    args = parser.parse_args()
    if args.part == "stub":
        encode_stub(args.folder)
        return
    if args.part == "memory":
        result = memory(args.rows or TEXTS)
        claims = [common.Claim("memory of `raybge.encode` with four times the texts", result["growth"], GROWTH, True)]
    elif args.part == "backends":
        import encoding_backends

        count = args.rows or BACKEND_TEXTS
        texts = [row["text"] for row in common.rows(args.data, count + SAMPLES)]
        peers = {"onnx": args.onnx_python, "openvino": args.openvino_python}
        peers = {backend: python for backend, python in peers.items() if python}
        result = encoding_backends.run(
            texts[SAMPLES:], texts[:SAMPLES], common.minilm(), args.parts, args.threads, peers
        )
        ratios, peer = result["ratios"], "sentence-transformers"
        claims = [
            common.Claim(f"passages per CPU second in bf16, against {peer} as it comes", ratios["bf16 as it comes"], 5),
            common.Claim(f"in bf16, against {peer} with bf16 weights", ratios["bf16"], 1.5),
            common.Claim(f"in int8, against {peer} as it comes", ratios["int8 as it comes"]),
            common.Claim(f"in int8, against {peer} at its best here", ratios["int8"], 1.2),
        ]
    else:
        texts = [row["text"] for row in common.rows(args.data, args.rows)]
        result = speed(texts, args.batch_size, args.parts, args.threads)
        claims = [
            common.Claim("texts per second, raybge.Encoder against sentence-transformers", result["ratio"], CLAIM)
        ]
    common.write_result(result, args.out, claims)


if __name__ == "__main__":
    main()
