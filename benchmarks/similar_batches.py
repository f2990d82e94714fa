"""Cost of `--batch_by similarity`: time and memory of a training on generated groups, with and without it.

    python benchmarks/similar_batches.py --groups 1000000 --out runs/bench/similar-batches.json
    python benchmarks/similar_batches.py --groups 100000

A tiny BERT trains one epoch twice, in random and in similar batches of 64 groups of 2, each run a process of its own.
It takes at most 10% more time, and the driver at most 600 MB. This is the hardest case for the time: a larger model
takes more time for each step and no more for reading, and encodes the queries in a smaller share of its training.
Queries have words of one of a thousand topics.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

RATIO, DRIVER_LIMIT = 1.1, 600e6
TOPICS, BATCH = 1000, 64


def write_groups(path: Path, count: int) -> None:
    """Write groups of number words: a query of 8, passages of 24."""
    rng = random.Random(0)

    def text(topic: int, words: int) -> str:
        return " ".join(str((topic * 25 + rng.randrange(25)) % common.WORDS) for _ in range(words))

    with path.open("w") as file:
        for _ in range(count):
            topic = rng.randrange(TOPICS)
            row = {"query": text(topic, 8), "pos": [text(topic, 24)], "neg": [text(rng.randrange(TOPICS), 24)]}
            file.write(json.dumps(row) + "\n")


def write_model(folder: Path) -> None:
    """Write a BERT of two layers of 64 with random weights."""
    import torch
    import transformers

    from raybge.model.folder import FolderSettings, write_settings

    common.write_words(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    model = transformers.BertModel(transformers.BertConfig(**size), add_pooling_layer=False)
    model.save_pretrained(folder)
    write_settings(folder, FolderSettings(pooling="mean", normalize=True, max_length=32), 64, {})


def train(folder: Path, batch_by: str, workers: int) -> dict[str, float]:
    """Train one epoch; return seconds of the command and of the training in it, and peaks in bytes."""
    output = folder / batch_by
    flags = {
        "model_name_or_path": folder / "model",
        "train_data": folder / "groups.jsonl",
        "output_dir": output,
        "batch_by": batch_by,
        "global_batch_size": BATCH,
        "train_group_size": 2,
        "query_max_len": 16,
        "passage_max_len": 32,
        "num_workers": workers,
        "save_strategy": "no",
        # the same objective in both
        "false_negative_margin": 0,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    start = time.monotonic()
    driver = subprocess.Popen([sys.executable, "-m", "raybge.train", *words], stdout=subprocess.DEVNULL)
    peaks = common.peaks(driver)
    results = json.loads((output / "train_results.json").read_text())
    return {
        "seconds": time.monotonic() - start,
        "training_seconds": results["train_runtime"],
        "driver": peaks["driver"],
        "largest": max(peaks.values()),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--groups", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1)
    args: argparse.Namespace = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_groups(folder / "groups.jsonl", args.groups)
        write_model(folder / "model")
        runs: dict[str, Any] = {each: train(folder, each, args.workers) for each in ("random", "similarity")}
    for each, figures in runs.items():
        print(
            f"{each:<11}{figures['seconds']:8.1f} s, of which training {figures['training_seconds']:8.1f} s; driver "
            f"{figures['driver'] / 1e6:,.0f} MB, largest process {figures['largest'] / 1e6:,.0f} MB"
        )
    ratio = runs["similarity"]["seconds"] / runs["random"]["seconds"]
    claims = [
        common.Claim(f"time of {args.groups:,} groups, times that in random batches", ratio, RATIO, at_most=True),
        common.Claim("MB of the driver", runs["similarity"]["driver"] / 1e6, DRIVER_LIMIT / 1e6, at_most=True),
    ]
    common.write_result({"groups": args.groups, "runs": runs}, args.out, claims)


if __name__ == "__main__":
    main()
