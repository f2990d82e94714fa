"""Retrieval with vectors in bf16 and in int8 against those in fp32, on medquad's dev split.

    python benchmarks/precision.py --out runs/bench/precision.json
    python benchmarks/precision.py --queries 200 --corpus 2000

`raybge.evaluate` measures MiniLM on the same queries and corpus in each precision. The claims: nDCG@10 in bf16 differs
from that in fp32 by at most 0.002, in int8 by at most 0.005.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

# flags of each precision, and the largest difference from fp32
PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {
    "bf16": ({"encode_precision": "bf16"}, 0.002),
    "int8": ({"encode_backend": "openvino", "encode_precision": "int8"}, 0.005),
}


def evaluate(folder: Path, name: str, flags: dict[str, Any]) -> float:
    """Return nDCG@10 as `raybge.evaluate` measures it."""
    metrics = folder / f"{name}.json"
    values = {
        "encoder": common.minilm(),
        "corpus_data": folder / "corpus.jsonl",
        "query_data": folder / "dev.jsonl",
        "k": 10,
        "metrics_file": metrics,
        **flags,
    }
    words = [str(word) for flag, value in values.items() for word in (f"--{flag}", value)]
    subprocess.run([sys.executable, "-m", "raybge.evaluate", *words], check=True)
    return float(json.loads(metrics.read_text())["nDCG@10"])


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--queries", type=int, default=700)
    parser.add_argument("--corpus", type=int, default=16_000)
    args = parser.parse_args()
    if not common.MEDQUAD.is_dir():
        raise SystemExit(f"medquad is not at {common.MEDQUAD}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        common.write_judged(folder, args.queries, args.corpus)
        values = {"fp32": evaluate(folder, "fp32", {})}
        values |= {name: evaluate(folder, name, flags) for name, (flags, _) in PRECISIONS.items()}
    claims = []
    for name, (_, limit) in PRECISIONS.items():
        difference = abs(values[name] - values["fp32"])
        claims.append(common.Claim(f"nDCG@10 in {name}, difference from fp32", difference, limit, at_most=True))
    print(", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    common.write_result({"settings": vars(args), "nDCG@10": values}, args.out, claims)


if __name__ == "__main__":
    main()
