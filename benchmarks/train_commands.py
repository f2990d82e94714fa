"""Whole commands: `raybge.train` against a training script of sentence-transformers, as users run them.

    python benchmarks/train_commands.py --out runs/bench/commands.json
    python benchmarks/train_commands.py --groups 128 --rounds 1 --peers raybge-bf16 sentence-transformers-bf16

Both fine-tune all-MiniLM-L6-v2 for one epoch on the same file of groups (a query of at most 64 tokens, its answer and
one negative of at most 256), batches of 32, AdamW, one process with all threads, in fp32 and in bf16. The script of
sentence-transformers is `SentenceTransformerTrainer` with `MultipleNegativesRankingLoss`, a `datasets.Dataset` of the
three columns and `bf16=True` for bf16. In each round every peer runs once, in turn.

Printed are the groups per second of the training loop (`train_samples_per_second` of both), the seconds of the whole
command, and for raybge the seconds from its start until the first step has its rows.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

BATCH, QUERY, PASSAGE = 32, 64, 256
POLL_SECONDS = 0.05
SCRIPT = """
import json, sys
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
import torch

folder, data, output, bf16, threads, batch = sys.argv[1:]
torch.set_num_threads(int(threads))
rows = [json.loads(line) for line in open(data)]
columns = {
    "anchor": [row["query"] for row in rows],
    "positive": [row["pos"][0] for row in rows],
    "negative": [row["neg"][0] for row in rows],
}
model = SentenceTransformer(folder, device="cpu")
model.max_seq_length = 256
args = SentenceTransformerTrainingArguments(
    output_dir=output, per_device_train_batch_size=int(batch), num_train_epochs=1, learning_rate=2e-5, use_cpu=True,
    bf16=bf16 == "bf16", save_strategy="no", report_to="none", logging_steps=100, disable_tqdm=True,
)
loss = MultipleNegativesRankingLoss(model, scale=50)
trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=Dataset.from_dict(columns), loss=loss)
metrics = trainer.train().metrics
model.save(output)
json.dump(metrics, open(f"{output}/train_results.json", "w"))
"""


def raybge_command(data: str, output: str, precision: str, threads: int) -> list[str]:
    """Return the command line of `raybge.train`."""
    flags = {
        "model_name_or_path": common.minilm(),
        "train_data": data,
        "output_dir": output,
        "per_device_train_batch_size": BATCH,
        "train_group_size": 2,
        "query_max_len": QUERY,
        "passage_max_len": PASSAGE,
        "num_train_epochs": 1,
        "learning_rate": 2e-5,
        "temperature": 0.02,
        "num_workers": 1,
        "cpus_per_worker": threads,
        "save_strategy": "no",
        "log_rows": True,
        **({"bf16": True} if precision == "bf16" else {}),
    }
    return [
        sys.executable,
        "-m",
        "raybge.train",
        *(str(word) for flag, v in flags.items() for word in (f"--{flag}", v)),
    ]


def peer_command(data: str, output: str, precision: str, threads: int) -> list[str]:
    """Return the command line of sentence-transformers' script."""
    return [sys.executable, "-c", SCRIPT, common.minilm(), data, output, precision, str(threads), str(BATCH)]


PEERS = {
    f"{name}-{precision}": (command, precision)
    for name, command in (("raybge", raybge_command), ("sentence-transformers", peer_command))
    for precision in ("fp32", "bf16")
}


def measure(name: str, data: str, threads: int) -> dict[str, float]:
    """Run a peer's command once and return its figures."""
    command, precision = PEERS[name]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out")
        start = time.monotonic()
        with open(Path(folder, "log"), "w") as log:
            process = subprocess.Popen(command(data, str(output), precision, threads), stdout=log, stderr=log)
        first_step = None
        while process.poll() is None:
            if first_step is None and name.startswith("raybge") and any(output.glob("*/1-0.jsonl")):
                first_step = time.monotonic() - start
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - start
        if process.returncode:
            raise SystemExit(f"{name} failed:\n{Path(folder, 'log').read_text()[-2000:]}")
        results = json.loads((output / "train_results.json").read_text())
    figures = {"groups_per_second": float(results["train_samples_per_second"]), "seconds": seconds}
    return figures | ({"seconds_to_first_step": first_step} if first_step is not None else {})


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    args = parser.parse_args()
    medquad = common.medquad("train.jsonl.gz")
    rows = common.rows(medquad, args.groups) if medquad else common.random_rows(args.groups, 0)
    answers = [row["pos"][0] for row in rows]
    content = [
        {"query": row["query"], "pos": row["pos"][:1], "neg": (row.get("neg") or [answers[i - 37]])[:1]}
        for i, row in enumerate(rows)
    ]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.peers}
    with tempfile.TemporaryDirectory() as scratch:
        data = common.write_rows(Path(scratch, "groups.jsonl"), content)
        for number in range(args.rounds):
            for name in args.peers:
                runs[name].append(measure(name, data, args.threads))
                print(f"round {number + 1}, {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in runs[name][-1].items()))
    result: dict[str, Any] = {"settings": vars(args), "runs": runs}
    result["medians"] = {
        name: {key: round(statistics.median(run[key] for run in each), 3) for key in each[0]}
        for name, each in runs.items()
    }
    for name, each in result["medians"].items():
        print(f"{name:>28}: " + ", ".join(f"{key} {value}" for key, value in each.items()))
    common.write_result(result, args.out, claims(result["medians"]))


def claims(medians: dict[str, dict[str, float]]) -> list[common.Claim]:
    """Return what the medians say about the goals."""
    lines = []
    for ours, peer, goal in (
        ("raybge-bf16", "sentence-transformers-fp32", 0.85 * 4.5),
        ("raybge-bf16", "sentence-transformers-bf16", 0.85 * 3),
        ("raybge-fp32", "sentence-transformers-fp32", 0.85 * 2.2),
    ):
        if ours in medians and peer in medians:
            ratio = medians[ours]["groups_per_second"] / medians[peer]["groups_per_second"]
            lines.append(common.Claim(f"`raybge.train`, {ours}, groups per second against {peer}", ratio, goal))
    for name, figures in medians.items():
        if "seconds_to_first_step" in figures:
            line = f"seconds from the command to the first step, {name}"
            lines.append(common.Claim(line, figures["seconds_to_first_step"], 15, at_most=True))
    return lines


if __name__ == "__main__":
    main()
