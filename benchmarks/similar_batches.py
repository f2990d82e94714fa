"""Cost of `--batch_by similarity` on generated groups: clusters, reading in their order, and the driver's memory.

    python benchmarks/similar_batches.py --groups 1000000 --out runs/bench/similar-batches.json
    python benchmarks/similar_batches.py --groups 100000

Clusters come from vectors of 384 numbers around a thousand directions, as `--batch_vectors` reads them; without them
the encoding of the queries is added. Then one process reads an epoch of steps of 64 groups without tokenizing, once in
random and once in similar batches. Clustering and additional reading take at most 10% of a training at `--rate` groups
a second (default: MiniLM on two cores, train_speed.py), and the process that starts them at most 600 MB.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

SHARE, DRIVER_LIMIT = 0.1, 600e6
TOPICS, BATCH, DIM, CHUNK = 1000, 64, 384, 50_000


def write_groups(folder: Path, count: int) -> None:
    """Write groups of number words, a query of 8 and passages of 100, and the vectors of their queries."""
    import numpy as np

    rng, vector_rng = random.Random(0), np.random.default_rng(0)
    directions = vector_rng.standard_normal((TOPICS, DIM)).astype(np.float32)
    vectors_ND = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (count, DIM))
    with (folder / "groups.jsonl").open("w") as file:
        for first in range(0, count, CHUNK):
            topics = [rng.randrange(TOPICS) for _ in range(min(CHUNK, count - first))]
            noise = vector_rng.standard_normal((len(topics), DIM), np.float32)
            vectors_ND[first : first + len(topics)] = directions[topics] + noise
            for topic in topics:
                words = [[str(topic * 25 + rng.randrange(25)) for _ in range(n)] for n in (8, 100, 100)]
                query, pos, neg = (" ".join(each) for each in words)
                file.write(json.dumps({"query": query, "pos": [pos], "neg": [neg]}) + "\n")


class NoTokenizer:
    """Stands for a tokenizer in the reader of steps: parses the groups and returns the number of rows."""

    def __init__(self) -> None:
        from raybge.data.groups import parse_group

        self.parse = parse_group

    def __call__(self, epoch: int, step: int, rows: Sequence[Any], copies: Sequence[int] | None = None) -> int:
        return len(rows)


def read_seconds(survey: Any, order: Any) -> float:
    """Return the seconds that reading an epoch takes."""
    from raybge.data.stream import StepReader

    tokenizer: Any = NoTokenizer()
    reader: Any = StepReader.of(survey, order, tokenizer)
    start = time.monotonic()
    rows = sum(sum(reader.steps(0, window)) for window in order.windows(0, 0, 1))
    assert rows == order.total
    return time.monotonic() - start


def measure(folder: Path) -> None:
    """Cluster and read in this process, on a Ray of its own; write the seconds to result.json."""
    import numpy as np
    import ray

    from raybge.cli.console import Console
    from raybge.cluster.resources import Plan
    from raybge.data.groups import parse_group
    from raybge.data.order import Order, block_bytes, window_rows
    from raybge.data.similar_rows import sort_by_cluster
    from raybge.data.source_files import list_files
    from raybge.data.survey import survey
    from raybge.search.query_clusters import QueryVectors, cluster_queries

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    files = list_files([str(folder / "groups.jsonl")], "--train_data")
    size = sum(file.size for file in files)
    data = survey(files, block_bytes(size), parse_group)
    window = window_rows(size, data.total_rows)
    order = Order(data.rows, BATCH, 0, window_rows=window)
    clusters = min(max(order.total // (8 * BATCH), 2), 2048)
    start = time.monotonic()
    label_N = np.lib.format.open_memmap(folder / "labels.npy", "w+", np.uint16, (data.total_rows,))
    vectors = QueryVectors(DIM, path=str(folder / "vectors.npy"))
    cluster_queries(data, parse_group, vectors, clusters, 0, Plan(2, 1, 0), label_N, Console(True, True, False))
    clustered = time.monotonic()
    rows = str(folder / "rows.npy")
    similar = sort_by_cluster(rows, lambda a, b: np.array(label_N[a:b]), data.rows, order.mixture, clusters, 0)
    result = {"clusters": clusters, "cluster": clustered - start, "sort": time.monotonic() - clustered}
    ray.shutdown()
    result["read_random"] = read_seconds(data, order)
    result["read_similar"] = read_seconds(data, order.with_similar(similar))
    (folder / "result.json").write_text(json.dumps(result))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--groups", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=3.7, help="groups that a training takes a second")
    parser.add_argument("--folder", help="of the inputs: measure in this process")
    args: argparse.Namespace = parser.parse_args()
    if args.folder:
        measure(Path(args.folder))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_groups(folder, args.groups)
        peaks = common.peaks(subprocess.Popen([sys.executable, __file__, "--folder", name]))
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    print({key: round(value, 1) for key, value in result.items()})
    for process, size in sorted(peaks.items(), key=lambda each: -each[1])[:6]:
        print(f"{size / 1e6:8,.0f} MB  {process}")
    seconds = result["cluster"] + result["sort"] + max(result["read_similar"] - result["read_random"], 0)
    share = seconds * args.rate / args.groups
    claims = [
        common.Claim(f"share of training {args.groups:,} groups at {args.rate:g}/s", share, SHARE, at_most=True),
        common.Claim("MB of the driver", peaks["driver"] / 1e6, DRIVER_LIMIT / 1e6, at_most=True),
    ]
    common.write_result({"groups": args.groups, "seconds": result, "rate": args.rate}, args.out, claims)


if __name__ == "__main__":
    main()
