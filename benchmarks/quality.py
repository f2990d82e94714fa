"""Retrieval after equal steps: raybge in fp32 and in bf16 against FlagEmbedding, on medquad.

    python benchmarks/quality.py --rows 3200 --batch 32 --seeds 1 2 3 --out runs/bench/quality.json

All fine-tune MiniLM with the same flags for one epoch of the same --rows groups with mined negatives, one process on
the CPU each, once per seed. Each sees each group once: in a part of an epoch, the result would depend on the order.
Then `raybge.evaluate` measures every model on the same queries and corpus. FlagEmbedding 1.4.2 runs with its own
command (`python -m FlagEmbedding.finetune.embedder.encoder_only.base`): its runner, data set, collator, model and
Trainer. It must be importable:

    pip install --no-deps --target DIR FlagEmbedding==1.4.2 peft; PYTHONPATH=DIR python benchmarks/quality.py ...

--data names groups with negatives; without it they are mined from medquad's training answers first (`raybge.mine`,
ranks 10 to 210, 7 negatives). The queries are the first --queries rows of medquad's dev split, the corpus --corpus
passages: all answers of these queries and the first passages of the corpus file.

The claims: the mean nDCG@10 over the seeds is at least FlagEmbedding's, and that in bf16 differs from that in fp32 by
at most the spread of the seeds in fp32.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import common

from raybge.evaluation.metrics import METRICS

BF16 = "raybge in bf16"
PEERS = ["raybge", BF16, "FlagEmbedding"]


def flags(args: argparse.Namespace, data: str, output: Path, seed: int) -> dict[str, Any]:
    """Return the flags of both commands."""
    return {
        "model_name_or_path": common.minilm(),
        "train_data": data,
        "output_dir": output,
        "train_group_size": args.group_size,
        "query_max_len": args.query_len,
        "passage_max_len": args.passage_len,
        "sentence_pooling_method": "mean",
        "normalize_embeddings": True,
        "temperature": 0.02,
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.batch,
        "num_train_epochs": 1,
        "seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }


def train(peer: str, args: argparse.Namespace, data: str, output: Path, seed: int) -> None:
    """Fine-tune with one of the two commands."""
    values = flags(args, data, output, seed)
    if peer.startswith("raybge"):
        module = "raybge.train"
        values |= {"num_workers": 1, "cpus_per_worker": args.threads}
        values |= {"bf16": True} if peer == BF16 else {}
    else:
        module = "FlagEmbedding.finetune.embedder.encoder_only.base"
        values |= {"cache_path": output.parent / "cache"}
    command([sys.executable, "-m", module], values, args.threads)


def command(program: list[str], values: dict[str, Any], threads: int) -> None:
    """Run a program with flags."""
    words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    subprocess.run([*program, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def evaluate(model: str, args: argparse.Namespace, work: Path) -> dict[str, float]:
    """Run `raybge.evaluate` in a process of its own, with pooling by flags: FlagEmbedding's folders do not state it."""
    path = work / "metrics.json"
    values = {
        "encoder": model,
        "corpus_data": work / "corpus.jsonl",
        "query_data": work / "dev.jsonl",
        "max_query_length": args.query_len,
        "max_passage_length": args.passage_len,
        "pooling_method": "mean",
        "normalize_embeddings": True,
        "k": 10,
        "metrics_file": path,
    }
    command([sys.executable, "-m", "raybge.evaluate"], values, args.threads)
    metrics = json.loads(path.read_text())
    return {name: metrics[name] for name in METRICS}


def groups(args: argparse.Namespace, work: Path) -> str:
    """Write the groups that both are trained on, a sample that is the same for every seed, and return their path."""
    source = Path(args.data or work / "mined.jsonl")
    if not source.exists():
        values = {
            "model_name_or_path": common.minilm(),
            "input_file": common.MEDQUAD / "train.jsonl.gz",
            "output_file": source,
            "range_for_sampling": "10-210",
            "negative_number": 7,
            "embedder_passage_max_length": args.passage_len,
        }
        command([sys.executable, "-m", "raybge.mine"], values, args.threads)
    sample = random.Random(0).sample(common.rows(source), args.rows)
    return common.write_rows(work / "groups.jsonl", sample)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", help="groups {query, pos, neg} with negatives; default: mined from medquad")
    parser.add_argument(
        "--work", default="runs/bench/quality", help="folder for models and files; existing models are deleted"
    )
    parser.add_argument("--rows", type=int, default=3200, help="groups of the epoch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--batch", type=int, default=32, help="groups per step")
    parser.add_argument("--group_size", type=int, default=4)
    parser.add_argument("--query_len", type=int, default=64)
    parser.add_argument("--passage_len", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--queries", type=int, default=700)
    parser.add_argument("--corpus", type=int, default=3000)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    args = parser.parse_args()
    if not common.MEDQUAD.is_dir():
        raise SystemExit(f"medquad is not at {common.MEDQUAD}")
    peers = args.peers
    if "FlagEmbedding" in peers and importlib.util.find_spec("FlagEmbedding") is None:
        print("FlagEmbedding is omitted: it cannot be imported (see the docstring of this file)")
        peers.remove("FlagEmbedding")
    work = Path(args.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    common.write_judged(work, args.queries, args.corpus)
    data = groups(args, work)
    before = evaluate(common.minilm(), args, work)
    print("before: " + ", ".join(f"{name} {value:.4f}" for name, value in before.items()), flush=True)
    results: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    for seed in args.seeds:
        for peer in peers:
            output = work / f"{peer}-{seed}"
            shutil.rmtree(output, ignore_errors=True)
            train(peer, args, data, output, seed)
            results[peer].append(evaluate(str(output), args, work))
            metrics = ", ".join(f"{name} {value:.4f}" for name, value in results[peer][-1].items())
            print(f"seed {seed}, {peer}: {metrics}", flush=True)
    means = {peer: {name: statistics.mean(each[name] for each in results[peer]) for name in METRICS} for peer in peers}
    for peer, mean in means.items():
        print(f"mean, {peer}: " + ", ".join(f"{name} {value:.4f}" for name, value in mean.items()))
    result = {"settings": vars(args), "before": before, "by_seed": results, "mean": means}
    common.write_result(result, args.out, claims(results))


def claims(results: dict[str, list[dict[str, float]]]) -> list[common.Claim]:
    """Return the differences of the means of nDCG@10 that the claims limit."""
    by_seed = {peer: [each["nDCG@10"] for each in seeds] for peer, seeds in results.items()}
    means = {peer: statistics.mean(each) for peer, each in by_seed.items()}
    lines = []
    if means.keys() >= {"raybge", "FlagEmbedding"}:
        difference = means["raybge"] - means["FlagEmbedding"]
        lines.append(common.Claim("mean nDCG@10 after one epoch, raybge less FlagEmbedding", difference, 0.0))
    if means.keys() >= {"raybge", BF16}:
        difference, spread = abs(means[BF16] - means["raybge"]), max(by_seed["raybge"]) - min(by_seed["raybge"])
        text = "mean nDCG@10 after one epoch, difference of bf16 from fp32 (goal: the spread of the seeds)"
        lines.append(common.Claim(text, difference, spread, at_most=True))
    return lines


if __name__ == "__main__":
    main()
