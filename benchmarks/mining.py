"""Mining: time of the whole command and of FlagEmbedding with one faiss index, and the memory of each process.

    python benchmarks/mining.py speed --out runs/bench/mining-speed.json
    python benchmarks/mining.py memory --out runs/bench/mining-memory.json

speed: `raybge.mine` on medquad's training rows (ranks 2 to 100, 7 negatives, queries 32 and passages 128 tokens), in
fp32, in bf16, and in int8 with candidates rescored in fp32, against FlagEmbedding 1.4.2 encoding the same queries and
passages and one faiss index searching for the same ranks. All are programs of their own with the same number of
threads, start-up included; they run in turn, `--rounds` times. The peer writes no groups and samples no negatives.
FlagEmbedding must be importable (see quality.py). `--variants` selects some of raybge's.

memory: mining 2,000 rows from a generated pool of 1,000,000 short passages, with an embedder of fixed vectors (the stub
of the tests, 384 numbers), keeps every process below 2 GB and the driver below 600 MB. Memory is the resident size
that `ps` reports five times a second, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

PEER = "FlagEmbedding and faiss"
# flags of each variant of `raybge.mine`, and how many times as fast as the peer it should be
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": ({}, 1.4),
    "bf16": ({"use_bf16": True}, 3.0),
    "int8": ({"encode_backend": "openvino", "encode_precision": "int8", "rescore": True}, 3.0),
}
PROCESS_LIMIT, DRIVER_LIMIT = 2e9, 600e6
PASSAGES, ROWS = 1_000_000, 2_000


# --- speed ------------------------------------------------------------------------------------------------------------


def mine(args: argparse.Namespace, output: Path, variant: str) -> list[str]:
    """Return the command line of raybge.mine."""
    flags = {
        "model_name_or_path": common.minilm(),
        "input_file": args.data,
        "output_file": output,
        "range_for_sampling": "2-100",
        "negative_number": 7,
        "embedder_query_max_length": 32,
        "embedder_passage_max_length": 128,
        **VARIANTS[variant][0],
    }
    return [sys.executable, "-m", "raybge.mine", *(str(word) for k, v in flags.items() for word in (f"--{k}", v))]


def peer(args: argparse.Namespace) -> None:
    """Encode all queries and distinct passages with FlagEmbedding and search one exact index, in this process."""
    import faiss
    import numpy as np
    import torch
    from FlagEmbedding.inference.embedder.encoder_only.base import BaseEmbedder

    torch.set_num_threads(args.threads)
    rows = common.rows(args.data)
    pool = list(dict.fromkeys(text for row in rows for text in (*row["pos"], *row.get("neg", []))))
    options = {"normalize_embeddings": True, "use_fp16": False, "pooling_method": "mean", "devices": "cpu"}
    model = BaseEmbedder(common.minilm(), **options)
    p_PD = model.encode_corpus(pool, batch_size=256, max_length=128)
    q_QD = model.encode_queries([row["query"] for row in rows], batch_size=256, max_length=32)
    index = faiss.IndexFlatIP(p_PD.shape[1])
    index.add(np.ascontiguousarray(p_PD, np.float32))
    for at in range(0, len(q_QD), 64):
        index.search(np.ascontiguousarray(q_QD[at : at + 64], np.float32), 100)


def speed(args: argparse.Namespace) -> tuple[dict[str, Any], list[common.Claim]]:
    """Measure the seconds of the programs."""
    seconds: dict[str, list[float]] = {name: [] for name in (*args.variants, PEER)}
    other = [sys.executable, __file__, "peer", "--threads", str(args.threads), "--data", args.data]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name, times in seconds.items():
                command = other if name == PEER else mine(args, Path(folder, f"{name}-{number}.jsonl"), name)
                start = time.monotonic()
                subprocess.run(command, check=True)
                times.append(round(time.monotonic() - start, 2))
                print(f"round {number + 1}, {name}: {times[-1]:.1f} s", flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    claims = [
        common.Claim(f"`raybge.mine` in {name} against {PEER}", medians[PEER] / medians[name], VARIANTS[name][1])
        for name in args.variants
    ]
    return {"seconds": seconds}, claims


# --- memory -----------------------------------------------------------------------------------------------------------


def run_stub(args: argparse.Namespace) -> None:
    """Mine with the stub in this process, the driver."""
    from raybge.cli.console import Console
    from raybge.cli.options import MineOptions
    from raybge.cli.parser import build_options
    from raybge.mining.run import mine

    folder = Path(args.folder)
    import stub

    flags = {"range_for_sampling": "2-200", "negative_number": 7, "output_file": str(folder / "out.jsonl")}
    files = {"input_file": str(folder / "rows.jsonl"), "candidate_pool": str(folder / "pool.jsonl")}
    mine(build_options(MineOptions, {**flags, **files}), Console(), stub.embedder(dim=384))


def memory(args: argparse.Namespace) -> tuple[dict[str, Any], list[common.Claim]]:
    """Measure the peak memory of every process of a mining run."""
    tests = str(Path(__file__).resolve().parents[1] / "tests" / "support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/pool.jsonl", "w") as pool:
            pool.writelines(
                f'{{"text": "passage {i} of a pool that holds {PASSAGES} of them"}}\n' for i in range(PASSAGES)
            )
        rows = [{"query": f"query {i}", "pos": [f"answer {i}"]} for i in range(ROWS)]
        common.write_rows(Path(folder, "rows.jsonl"), rows)
        start = time.monotonic()
        driver = subprocess.Popen([sys.executable, __file__, "stub", "--folder", folder], env=environment)
        peaks = common.peaks(driver)
        seconds = time.monotonic() - start
        assert len(common.rows(f"{folder}/out.jsonl")) == ROWS
    for name, size in sorted(peaks.items(), key=lambda each: -each[1]):
        print(f"{size / 1e6:8,.0f} MB  {name}")
    claims = [
        common.Claim("MB of the largest process", max(peaks.values()) / 1e6, PROCESS_LIMIT / 1e6, at_most=True),
        common.Claim("MB of the driver", peaks["driver"] / 1e6, DRIVER_LIMIT / 1e6, at_most=True),
    ]
    return {"seconds": round(seconds, 1), "peak_mb": {k: round(v / 1e6) for k, v in peaks.items()}}, claims


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("part", choices=("speed", "memory", "peer", "stub"))
    parser.add_argument("--data", default=common.medquad("train.jsonl.gz"), help="groups; default: medquad's")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part in ("peer", "stub"):
        (peer if args.part == "peer" else run_stub)(args)
        return
    result, claims = speed(args) if args.part == "speed" else memory(args)
    common.write_result(result, args.out, claims)
    if not all(claim.is_reached for claim in claims):
        raise SystemExit("a claim does not hold")


if __name__ == "__main__":
    main()
