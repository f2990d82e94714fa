"""Search of learning rate and temperature on a part of medquad, with and without stopping trials early.

    python benchmarks/tuning.py --out runs/bench/tuning.json

One `raybge.tune` with `--scheduler none` and one with `--scheduler asha`, the same seed and flags, one trial at a time:
--trials trials of one epoch over --rows groups, a fifth of them held out, with a MiniLM of two layers. The claims: six
trials take at most six minutes on 2 cores, start-up included; and at an equal best metric asha uses at most 60% of the
steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

from raybge.evaluation.metrics import METRICS

SECONDS_CLAIM, STEPS_CLAIM = 60, 0.6  # seconds per trial; share of the steps


def small_model(folder: Path) -> str:
    """Write a model of MiniLM's first two layers and return its folder."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(common.minilm())
    model.encoder.layer = model.encoder.layer[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(common.minilm()).save_pretrained(folder)
    return str(folder)


def search(args: argparse.Namespace, work: Path, scheduler: str) -> dict[str, Any]:
    """Run a search and return its time, its steps and its best metric."""
    output = work / scheduler
    flags = {
        "model_name_or_path": work / "model",
        "train_data": work / "groups.jsonl",
        "output_dir": output,
        "overwrite_output_dir": True,
        "train_group_size": 2,
        "query_max_len": 16,
        "passage_max_len": 32,
        "sentence_pooling_method": "mean",
        "per_device_train_batch_size": 16,
        "num_train_epochs": args.epochs,
        "held_out": 0.2,
        "num_samples": args.trials,
        "max_concurrent": 1,
        "scheduler": scheduler,
        "seed": args.seed,
        "cpus_per_worker": args.threads,
    }
    start = time.monotonic()
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    subprocess.run([sys.executable, "-m", "raybge.tune", *words], check=True)
    trials = json.loads((output / "trials.json").read_text())["trials"]
    scores = [trial["metrics"][METRICS[0]] for trial in trials if trial["status"] == "finished"]
    return {
        "seconds": round(time.monotonic() - start, 1),
        "steps": sum(trial["curve"][-1][0] for trial in trials if trial["curve"]),
        "best": max(scores),
        "statuses": [trial["status"] for trial in trials],
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", default=common.medquad("train.jsonl.gz"), help="groups; default: medquad's")
    parser.add_argument("--work", default="runs/bench/tuning")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    work = Path(args.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    small_model(work / "model")
    common.write_rows(work / "groups.jsonl", common.rows(args.data, args.rows))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results = {scheduler: search(args, work, scheduler) for scheduler in ("none", "asha")}
    for scheduler, each in results.items():
        print(f"{scheduler}: {each['seconds']:.0f} s, {each['steps']:,} steps, best nDCG@10 {each['best']:.4f}")
    share = results["asha"]["steps"] / results["none"]["steps"]
    trial_seconds = results["none"]["seconds"] / args.trials
    equal = results["asha"]["best"] >= results["none"]["best"] - 1e-6
    print(f"a trial takes {trial_seconds:.0f} s (claim: at most {SECONDS_CLAIM})")
    print(
        f"asha: {share:.0%} of the steps (claim: at most {STEPS_CLAIM:.0%}), the best is {'' if equal else 'not '}equal"
    )
    holds = trial_seconds <= SECONDS_CLAIM and equal and share <= STEPS_CLAIM
    common.write_result(
        {"settings": vars(args), "results": results, "share": round(share, 3), "holds": holds}, args.out
    )
    if not holds:
        raise SystemExit("a claim does not hold")


if __name__ == "__main__":
    main()
